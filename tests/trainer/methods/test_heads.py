"""Heads in training against PEFT's models: the loss and its gradients, and what PEFT makes of the artifact."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.batch import IGNORED, ReadRow, collate_read
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.errors import BaseError
from manyhats.trainer.methods.head import UNTRAINED, check_head
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.targets import matches
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.model.head_loss import HeadLoss, contrastive_loss
from manyhats.trainer.report.served import read_saved
from manyhats.trainer.settings.methods import BottleneckSettings, LoraSettings
from support.factories.head_tasks import METHODS, HeadBase, head_base
from support.factories.tiny_encoders import ENCODERS
from support.factories.trainables import move, save
from support.oracles.classifiers import load_model as load_reference
from support.oracles.golden import GOLDEN, needs_golden

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TRAINED = tuple(family for family in ENCODERS if family.split()[0] not in UNTRAINED)
FAMILIES = (*TRAINED, "llama")
TASKS = {
    "classes": HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.CROSS_ENTROPY, classes=("a", "b", "c")),
    "sets": HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.BINARY_CROSS_ENTROPY, classes=("a", "b", "c")),
    "numbers": HeadTask(kind=TaskKind.CLASSIFY, loss=Loss.SQUARED_ERROR),
    "tags": HeadTask(kind=TaskKind.CLASSIFY_TOKENS, loss=Loss.CROSS_ENTROPY, classes=("a", "b", "c")),
    "vectors": HeadTask(kind=TaskKind.EMBED, loss=Loss.CONTRASTIVE, pooling=Pooling.MEAN, temperature=0.1),
}
KINDS = {
    TaskKind.CLASSIFY: TaskType.SEQ_CLS,
    TaskKind.CLASSIFY_TOKENS: TaskType.TOKEN_CLS,
    TaskKind.EMBED: TaskType.FEATURE_EXTRACTION,
}
LENGTHS = (9, 4, 17, 4)


def made(family: str, method: str, task: HeadTask) -> tuple[HeadBase, ParametrizedAdapter]:
    """An adapter with a head, moved from its beginning."""
    base = head_base(family)
    adapter = make_adapter(METHODS[method], "t", base.model, seed=3, head=task)
    move(adapter, size=0.1)
    return base, adapter


def has(family: str, method: str, kind: TaskKind) -> bool:
    adapter_method = METHODS[method].method
    try:
        check_head(kind, adapter_method, head_base(family).model.description)
    except BaseError:
        return False
    return adapter_method is not AdapterMethod.BOTTLENECK


def random_rows(task: HeadTask) -> list[ReadRow]:
    generator = torch.Generator().manual_seed(5)
    texts = [
        ReadText(tuple(torch.randint(3, 320, (length,), generator=generator).tolist())) for length in LENGTHS
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


def load_peft(
    base: HeadBase,
    adapter: ParametrizedAdapter,
    task: HeadTask,
    directory: Path,
    *,
    is_trainable: bool = False,
) -> Any:
    """PEFT's model of the artifact."""
    reference = load_reference(base.directory, KINDS[task.kind], task.num_outputs)
    model = PeftModel.from_pretrained(
        copy.deepcopy(reference), str(save(adapter, directory)), is_trainable=is_trainable
    )
    model.train(False)
    return model


def peft_outputs(model: Any, task: HeadTask, text: ReadText) -> Tensor:
    """[1, outputs] of a text, [T, outputs] of its tokens, or its vector [1, E]."""
    output = model(input_ids=torch.tensor([text.token_ids]))
    if task.kind is TaskKind.EMBED:
        rows: Tensor = output.last_hidden_state[0, -len(text.token_ids) :]
        return rows.mean(0, keepdim=True)
    logits: Tensor = output.logits
    return logits if logits.dim() == 2 else logits[0, -len(text.token_ids) :]


def peft_loss(model: Any, task: HeadTask, rows: list[ReadRow]) -> Tensor:
    """The mean loss as transformers computes it, or of vectors by its definition."""
    outputs = [peft_outputs(model, task, text) for row in rows for text in row.texts]
    if task.loss is Loss.CONTRASTIVE:
        vectors = functional.normalize(torch.cat(outputs), dim=1)
        scores = vectors[::2] @ vectors[1::2].T / task.temperature
        return nn.CrossEntropyLoss()(scores, torch.arange(len(scores)))
    targets = torch.tensor([target for row in rows for target in row.targets])
    logits = torch.cat(outputs)
    if task.loss is Loss.CROSS_ENTROPY:
        return nn.CrossEntropyLoss()(logits, targets.long())
    if task.loss is Loss.BINARY_CROSS_ENTROPY:
        return nn.BCEWithLogitsLoss()(logits, targets.view(logits.shape))
    return nn.MSELoss()(logits.squeeze(), targets)


def own_loss(base: HeadBase, adapter: ParametrizedAdapter, task: HeadTask, rows: list[ReadRow]) -> Tensor:
    decoder = TrainingDecoder(
        base.model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
    )
    loss = HeadLoss(decoder, task).loss(collate_read(rows), adapter.lowered())
    return loss / sum(row.num_targets for row in rows)


def file_gradients(adapter: ParametrizedAdapter, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss with respect to the parameters, by the names of the file."""
    gradients = torch.autograd.grad(loss, list(adapter.parameters.values()))
    return dict(zip(adapter.parameters, gradients, strict=True))


def peft_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The same of PEFT's model: its names without those of its adapter and of the wrapping of saved modules."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name.replace(".default", "").replace(".modules_to_save", ""): gradient
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_peft_s(family: str, task: str, tmp_path: Path) -> None:
    base, adapter = made(family, "lora", TASKS[task])
    rows = random_rows(TASKS[task])
    model = load_peft(base, adapter, TASKS[task], tmp_path, is_trainable=True)
    loss, expected = own_loss(base, adapter, TASKS[task], rows), peft_loss(model, TASKS[task], rows)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
    ours, theirs = file_gradients(adapter, loss), peft_gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        size = float(gradient.abs().max())
        assert size > 0, f"{name} has no gradient"
        assert float((ours[name] - gradient).abs().max()) <= 1e-4 * max(size, 1e-2), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_artifacts_load_in_peft_with_the_same_outputs(family: str, method: str, tmp_path: Path) -> None:
    for name, task in TASKS.items():
        if name in ("sets", "numbers") or not has(family, method, task.kind):
            continue
        base, adapter = made(family, method, task)
        model = load_peft(base, adapter, task, tmp_path / name)
        decoder = TrainingDecoder(
            base.model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
        )
        rows = random_rows(task)
        ours = HeadLoss(decoder, task).outputs(collate_read(rows), adapter.lowered())
        theirs = torch.cat([peft_outputs(model, task, text) for row in rows for text in row.texts])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=f"{family} {method} {name}")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi", "qwen2"])
def test_other_decoders_artifacts_load_in_peft_too(family: str, tmp_path: Path) -> None:
    test_artifacts_load_in_peft_with_the_same_outputs(family, "lora", tmp_path)
    for name in ("classes", "tags", "vectors"):
        if (tmp_path / name).is_dir():
            read_saved("t", tmp_path / name, head_base(family).model.description)
    assert (tmp_path / "vectors").is_dir()


# AdapterHub's heads, and what cannot be compared with a library


@needs_golden
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("fixture", "settings", "kind", "classes"),
    [
        (
            "minilm_seq_bn",
            BottleneckSettings(variant="seq", reduction_factor=16),
            TaskKind.CLASSIFY,
            ("neg", "neu", "pos"),
        ),
        (
            "minilm_double_seq_bn",
            BottleneckSettings(variant="double_seq", reduction_factor=32, non_linearity="swish"),
            TaskKind.CLASSIFY_TOKENS,
            ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
        ),
    ],
)
def test_heads_beside_bottlenecks_are_laid_out_as_adapterhub_s(
    fixture: str, settings: BottleneckSettings, kind: TaskKind, classes: tuple[str, ...]
) -> None:
    model = load_model("all-minilm-l6-v2", quantization="none", dtype=torch.float32)
    golden = GOLDEN / "encoders" / fixture / "adapter"
    theirs = json.loads((golden / "head_config.json").read_text())
    task = HeadTask(kind=kind, loss=Loss.CROSS_ENTROPY, classes=classes)
    files = make_adapter(settings, theirs["name"], model, seed=0, head=task).files("float32")
    ours = json.loads(files["head_config.json"])
    assert ours == theirs
    for name in ("adapter.safetensors", "model_head.safetensors"):
        saved, made = load((golden / name).read_bytes()), load(files[name])
        assert {key: value.shape for key, value in made.items()} == {
            key: value.shape for key, value in saved.items()
        }
    config = json.loads((golden / "adapter_config.json").read_text())
    own = json.loads(files["adapter_config.json"])
    assert {**own, "config": None} == {**config, "config": None}


@pytest.mark.parametrize("task", TASKS)
def test_rows_alone_are_those_of_a_batch(task: str) -> None:
    """Padding, which attention adds, does not show."""
    base, adapter = made("bert", "prompt", TASKS[task])
    decoder = TrainingDecoder(
        base.model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
    )
    losses, lowered, rows = HeadLoss(decoder, TASKS[task]), adapter.lowered(), random_rows(TASKS[task])
    together = losses.outputs(collate_read(rows), lowered)
    alone = torch.cat([losses.outputs(collate_read([row]), lowered) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_contrastive_loss_is_that_of_all_other_texts() -> None:
    vectors = torch.tensor([[1.0, 0], [3.0, 0], [0, 2.0], [0, 1.0], [1.0, 1.0]])
    # Queries 0 and 2; answers 1 and 3; 4 is another text of the second row.
    loss = contrastive_loss(vectors, [(0,), (1,), (2,), (3,), (4,)], (2, 3), 0.5)
    near = 2 * 0.5**0.5
    first = torch.tensor([2.0, 0.0, near])
    second = torch.tensor([0.0, 2.0, near])
    expected = -first.log_softmax(0)[0] - second.log_softmax(0)[1]
    assert float(loss) == pytest.approx(float(expected))
    # A text equal to the first answer is none of the others.
    same = contrastive_loss(vectors, [(0,), (1,), (2,), (3,), (1,)], (2, 3), 0.5)
    expected = -first[:2].log_softmax(0)[0] - second.log_softmax(0)[1]
    assert float(same) == pytest.approx(float(expected))


def test_names_of_modules_hit_no_part_of_a_head() -> None:
    task = TASKS["classes"]
    for family in TRAINED:
        config = make_adapter(LoraSettings(), "t", head_base(family).model, seed=0, head=task).config
        modules = [*head_base(family).model.description.modules, "classifier.dense", "classifier.out_proj"]
        hit = {path for path in modules if any(matches(path, name) for name in config["target_modules"])}
        layers = {path for path in modules if ".layer." in path}
        assert hit == layers


@pytest.mark.parametrize("family", [family for family in ENCODERS if family not in TRAINED])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_encoders_whose_layers_the_trainer_lacks_are_refused_by_name(family: str, task: HeadTask) -> None:
    base = head_base(family).model.description
    with pytest.raises(BaseError, match=f"{family.split()[0]} is served, but cannot be trained here"):
        check_head(task.kind, AdapterMethod.LORA, base)
