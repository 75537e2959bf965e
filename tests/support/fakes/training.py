"""A task small enough to take a step in a millisecond: a linear model of the next token, and a low-rank adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.primitives import LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.trainer.data.batch import TrainingBatch
from manyhats.trainer.data.dataset import DataCounts, Dataset, DatasetBuilder
from manyhats.trainer.data.task_data import TaskData
from manyhats.trainer.report.events import Listener, ignore
from manyhats.trainer.run.checkpoint import open_checkpoints
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.methods import LoraSettings
from manyhats.trainer.settings.settings import DataSettings, OptimizationSettings, TrainSettings

VOCAB_SIZE = 12
SIZE = 6


class FakeDecoder:
    """Logits of the next token: those of a random matrix, and the adapter's delta of them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.embed = torch.randn(VOCAB_SIZE, SIZE, generator=generator)
        self.head = torch.randn(VOCAB_SIZE, SIZE, generator=generator)
        self.batches: list[TrainingBatch] = []

    def loss(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        self.batches.append(batch)
        hidden = self.embed[batch.token_ids[batch.predictors]]
        logits = hidden @ self.head.T
        for delta in () if adapter is None else adapter.deltas:
            assert isinstance(delta, LowRank)
            dropped = nn.functional.dropout(hidden, dropout) if dropout else hidden
            logits = logits + delta.scale * (dropped @ delta.a.T) @ delta.b.T
        return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


class FakeAdapter:
    """One low-rank delta of the logits; B's learning rate is four times A's."""

    method = AdapterMethod.LORA

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dropout = dropout
        self.parameters: Mapping[str, nn.Parameter] = {
            "a": nn.Parameter(torch.randn(2, SIZE, generator=generator) * 0.3),
            "b": nn.Parameter(torch.zeros(VOCAB_SIZE, 2)),
        }
        self.num_lowered = 0

    def learning_rate_scale(self, name: str) -> float:
        return {"a": 1.0, "b": 4.0}[name]

    def lowered(self) -> LoweredAdapter:
        self.num_lowered += 1
        return LoweredAdapter(
            "", (LowRank(Site(0, "q_proj"), self.parameters["a"], self.parameters["b"] * 2, 0.5),)
        )

    def artifact(self) -> AdapterArtifact:
        raise NotImplementedError

    def files(self, save_dtype: str) -> Mapping[str, bytes]:
        tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return {"adapter_config.json": json.dumps({}).encode(), "adapter_model.safetensors": save(tensors)}


def make_dataset(num_rows: int = 24, seed: int = 0) -> Dataset:
    """Rows of 2 to 8 tokens, in which token t follows t − 1 more often than not."""
    generator = torch.Generator().manual_seed(seed)
    builder = DatasetBuilder()
    for line in range(1, num_rows + 1):
        length = int(torch.randint(2, 9, (), generator=generator))
        tokens = [int(torch.randint(VOCAB_SIZE, (), generator=generator))]
        while len(tokens) < length:
            jump = int(torch.randint(VOCAB_SIZE, (), generator=generator))
            is_next = bool(torch.rand((), generator=generator) < 0.7)
            tokens.append((tokens[-1] + 1) % VOCAB_SIZE if is_next else jump)
        first = int(torch.randint(1, length, (), generator=generator))
        targets = bytes([0] * first + [1] * (length - first))
        builder.add(tokens, targets, prompt_length=first, completion="x", line=line)
    return builder.build("fake.jsonl", DataCounts())


def make_train_settings(out: Path | str = "", *, task: str = "fake", **optimization: Any) -> TrainSettings:
    """Six steps an epoch of 24 rows, unless told otherwise."""
    fields: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.02, "epochs": 2, **optimization}
    return TrainSettings(
        task=task,
        adapter=LoraSettings(),
        data=DataSettings(train="fake.jsonl", eval="fake.jsonl"),
        optimization=OptimizationSettings(**fields),
        out=str(out),
    )


def make_run(
    settings: TrainSettings | None = None,
    *,
    decoder: FakeDecoder | None = None,
    adapter: FakeAdapter | None = None,
    train: Dataset | None = None,
    held_out: Dataset | None = None,
    listener: Listener = ignore,
    base: Mapping[str, str] | None = None,
) -> TrainingRun:
    """A run of fakes; one with the same arguments is the same run."""
    settings = settings or make_train_settings()
    data = TaskData(train or make_dataset(), held_out)
    return TrainingRun(
        settings,
        decoder or FakeDecoder(),
        adapter or FakeAdapter(),
        data,
        listener=listener,
        checkpoints=open_checkpoints(settings, data, base or {}),
    )


def run_to_end(run: TrainingRun) -> list[float]:
    """Every loss of its steps from now on."""
    losses = []
    while not run.is_done:
        losses.append(run.step().loss)
    return losses


def with_data(settings: TrainSettings, **data: Any) -> TrainSettings:
    return replace(settings, data=replace(settings.data, **data))


class PoisonedDecoder(FakeDecoder):
    """One loss of all becomes what ``poison`` makes of it, and its gradient with it."""

    def __init__(self, at_call: int, poison: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._at_call = at_call
        self._poison = poison

    def loss(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        loss = super().loss(batch, adapter, dropout=dropout)
        return self._poison(loss) if len(self.batches) == self._at_call else loss


class ScriptedDecoder(FakeDecoder):
    """Held-out losses as told, one for each evaluation of one batch; training is the fake's."""

    def __init__(self, held_out: Sequence[float]) -> None:
        super().__init__()
        self._held_out = iter(held_out)

    def loss(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        if torch.is_grad_enabled():
            return super().loss(batch, adapter, dropout=dropout)
        return torch.tensor(next(self._held_out) * len(batch.targets))
