"""Heads in training on tiny bases: what they learn, adapters moved from their beginning, rows, outputs and losses."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.batch import IGNORED, ReadRow, collate_read
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.errors import BaseError
from manyhats.trainer.methods.head import check_head
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.model.head_loss import HeadLoss
from support.factories.head_tasks import METHODS, HeadBase, head_base
from support.factories.trainables import move

TASKS = {
    "classes": HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.CROSS_ENTROPY, classes=("a", "b", "c")),
    "sets": HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.BINARY_CROSS_ENTROPY, classes=("a", "b", "c")),
    "numbers": HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.SQUARED_ERROR),
    "tags": HeadTask(kind=TaskKind.CLASSIFY_TOKENS, loss=Loss.CROSS_ENTROPY, classes=("a", "b", "c")),
    "vectors": HeadTask(kind=TaskKind.EMBED, loss=Loss.CONTRASTIVE, pooling=Pooling.MEAN, temperature=0.1),
}
LENGTHS = (9, 4, 17, 4)


def made(family: str, method: str, task: HeadTask) -> tuple[HeadBase, ParametrizedAdapter]:
    """An adapter with a head, moved from its beginning."""
    base = head_base(family)
    adapter = make_adapter(METHODS[method], "t", base.model, seed=3, head=task)
    move(adapter, size=0.1)
    return base, adapter


def trains(family: str, method: str, kind: TaskKind) -> bool:
    """Whether a library has such an adapter with such a head there."""
    try:
        check_head(kind, METHODS[method].method, head_base(family).model.description)
    except BaseError:
        return False
    return True


def has(family: str, method: str, kind: TaskKind) -> bool:
    """Whether PEFT does."""
    return METHODS[method].method is not AdapterMethod.BOTTLENECK and trains(family, method, kind)


def random_rows(task: HeadTask, lengths: tuple[int, ...] = LENGTHS) -> list[ReadRow]:
    """Texts of several lengths."""
    generator = torch.Generator().manual_seed(5)
    texts = [
        ReadText(tuple(torch.randint(3, 320, (length,), generator=generator).tolist())) for length in lengths
    ]
    if task.loss is Loss.CONTRASTIVE:
        return [ReadRow(tuple(texts[:2]), (), 1), ReadRow(tuple(texts[2:]), (), 1)]
    rows = []
    for index, text in enumerate(texts):
        targets: tuple[float, ...] = (float(index % 3),)
        if task.loss is Loss.BINARY_CROSS_ENTROPY:
            targets = (1.0, float(index % 2), 0.0)
        elif task.loss is Loss.SQUARED_ERROR:
            targets = (0.3 * index,)
        elif task.kind is TaskKind.CLASSIFY_TOKENS:
            targets = tuple(
                float(IGNORED if place % 3 == 0 else place % 3) for place in range(len(text.token_ids))
            )
        rows.append(ReadRow((text,), targets, sum(target != IGNORED for target in targets)))
    return rows


def losses_of(base: HeadBase, task: HeadTask) -> HeadLoss:
    decoder = TrainingDecoder(
        base.model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
    )
    return HeadLoss(decoder, task)


def own_outputs(base: HeadBase, adapter: ParametrizedAdapter, task: HeadTask, rows: list[ReadRow]) -> Tensor:
    """Of all texts, or of all tokens, in order."""
    return losses_of(base, task).outputs(collate_read(rows), adapter.lowered())


def own_loss(base: HeadBase, adapter: ParametrizedAdapter, task: HeadTask, rows: list[ReadRow]) -> Tensor:
    """The mean loss."""
    loss = losses_of(base, task).loss(collate_read(rows), adapter.lowered())
    return loss / sum(row.num_targets for row in rows)


def own_gradients(adapter: ParametrizedAdapter, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss with respect to the parameters, by the names of the file."""
    gradients = torch.autograd.grad(loss, list(adapter.parameters.values()))
    return dict(zip(adapter.parameters, gradients, strict=True))
