from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.data.batch import TokenizedRow, collate
from manyhats.trainer.data.dataset import LabelTokens
from manyhats.trainer.data.labels import LabelledItem
from manyhats.trainer.errors import OutputError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.report.label_scoring import score_labels
from manyhats.trainer.report.served import read_saved
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from support.factories.trainables import TinyBase, move, save, tiny_base

METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=3),
    "dora": LoraSettings(rank=3, use_dora=True),
    "ia3": Ia3Settings(),
    "bottleneck": BottleneckSettings(),
    "prefix": PrefixSettings(num_virtual_tokens=5, projection_size=8),
    "prompt": PromptSettings(num_virtual_tokens=5),
    "ptuning": PTuningSettings(num_virtual_tokens=5, encoder_size=8),
}


def random_tokens(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, 320, (count,), generator=generator).tolist())


def make_items(count: int, seed: int, labels: list[tuple[int, ...]]) -> list[LabelledItem]:
    tokens = tuple(LabelTokens(0, 0, label) for label in labels)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [LabelledItem(random_tokens(length, generator), tokens, "") for length in lengths]


@torch.no_grad()
def by_full_forwards(
    base: TinyBase,
    adapter: LoweredAdapter | None,
    items: list[LabelledItem],
    labels: list[tuple[int, ...]],
) -> tuple[int, ...]:
    """One forward of the trainer's decoder per item and label."""
    decoder = TrainingDecoder(
        base.model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
    )
    predicted = []
    for item in items:
        scores = []
        for label in labels:
            tokens = (*item.prompt_token_ids, *label)
            batch = collate([TokenizedRow(tokens, (False, *(True,) * (len(tokens) - 1)))])
            logprobs = decoder.logits(batch, adapter).log_softmax(-1)
            first = len(item.prompt_token_ids)
            scores.append(sum(float(logprobs[first + index - 1, token]) for index, token in enumerate(label)))
        predicted.append(scores.index(max(scores)))
    return tuple(predicted)


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_predicts_the_labels_of_full_forwards(method: str, tmp_path: Path) -> None:
    base = tiny_base("llama", "nf4")
    adapter = make_adapter(METHODS[method], "task", base.model, seed=0)
    move(adapter, size=0.2)
    save(adapter, tmp_path)
    generator = torch.Generator().manual_seed(4)
    labels = [random_tokens(length, generator) for length in (1, 3, 1, 2, 4, 1)]
    items = make_items(12, 3, labels)
    seen = []
    saved = read_saved("task", tmp_path, base.model.description)
    scores = score_labels(
        base.model,
        saved,
        items,
        dtype="float32",
        num_threads=1,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert scores.base == by_full_forwards(base, None, items, labels)
    assert scores.adapter == by_full_forwards(base, adapter.lowered(), items, labels)
    assert scores.base != scores.adapter
    assert len(set(scores.adapter)) > 1
    assert seen == [(done, 24) for done in range(1, 25)]


def test_an_interrupt_ends_the_scoring(tmp_path: Path) -> None:
    base = tiny_base("llama", "nf4")
    adapter = make_adapter(METHODS["lora"], "task", base.model, seed=0)
    move(adapter)
    save(adapter, tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    saved = read_saved("task", tmp_path, base.model.description)
    with pytest.raises(KeyboardInterrupt):
        score_labels(
            base.model,
            saved,
            make_items(30, 1, [(5,), (6,)]),
            dtype="float32",
            num_threads=1,
            on_progress=interrupt,
        )


def test_what_was_saved_is_read_as_a_registration_would(tmp_path: Path) -> None:
    base = tiny_base("llama", "nf4")
    adapter = make_adapter(METHODS["lora"], "task", base.model, seed=0)
    save(adapter, tmp_path)
    with pytest.raises(OutputError, match=r"cannot be served: .*changes nothing"):
        read_saved("task", tmp_path, base.model.description)
    move(adapter)
    save(adapter, tmp_path)
    record = read_saved("task", tmp_path, base.model.description).record
    assert (record.task_id, record.method.value) == ("task", "lora")
    assert record.digest.startswith("sha256:")
