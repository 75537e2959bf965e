"""The gradients of one optimizer step, over all its micro-batches, and the step's random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.data.batch import TrainingRow, batch_of
from manyhats.trainer.methods.adapter import TrainableAdapter


class LossModel(Protocol):
    """What a run needs from ``TrainingDecoder``, or from ``HeadLoss``."""

    def loss(self, batch: Any, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """The sum of the terms of the loss of a batch, which ``batch_of`` made of rows."""
        ...


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The mean loss over a step's targets, and how many tokens it had."""

    loss: float
    num_tokens: int
    num_targets: int


def accumulate_gradients(
    decoder: LossModel, adapter: TrainableAdapter, micro_batches: Sequence[Sequence[TrainingRow]]
) -> StepLoss:
    """Set the parameters' gradients to those of the mean loss over all targets of all micro-batches.

    So a step split into micro-batches equals one big batch, however the targets are spread over them; but where vectors
    are learned, a text is compared with those of its micro-batch alone.
    """
    num_targets = sum(row.num_targets for rows in micro_batches for row in rows)
    lowered = LoweredOnce(adapter.lowered())
    total, num_tokens = 0.0, 0
    for rows in micro_batches:
        batch = batch_of(rows)
        loss = decoder.loss(batch, lowered.adapter, dropout=adapter.dropout)
        (loss / num_targets).backward()
        total += loss.item()
        num_tokens += batch.num_row_tokens
    lowered.backward()
    return StepLoss(total / num_targets, num_tokens, num_targets)


class LoweredOnce:
    """Primitives detached from their parameters, which collect the micro-batches' gradients.

    Lowering may cost as much as a forward: DoRA's reads every weight of the base. The parameters do not change within a
    step, so it is done once, and ``backward`` goes back through it once.

    Args:
        lowered: with gradient history.
    """

    def __init__(self, lowered: LoweredAdapter) -> None:
        self._made: list[Tensor] = []
        self._cut: dict[int, Tensor] = {}
        self.adapter: LoweredAdapter = _map_tensors(lowered, self._leaf)

    def backward(self) -> None:
        """Propagate the collected gradients to the parameters. Call it once."""
        collected = [(made, self._cut[id(made)].grad) for made in self._made]
        reached = [(made, grad) for made, grad in collected if grad is not None]
        if reached:
            torch.autograd.backward([made for made, _ in reached], [grad for _, grad in reached])

    def _leaf(self, tensor: Tensor) -> Tensor:
        """A leaf in place of the tensor; the same one wherever it occurs."""
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in self._cut:
            self._made.append(tensor)
            self._cut[id(tensor)] = tensor.detach().requires_grad_()
        return self._cut[id(tensor)]


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested frozen dataclasses and tuples with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _map_tensors(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **changed)
    return value


@contextmanager
def step_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators from (seed, step) while entered; restore them afterwards.

    So dropout is the same even if the run was interrupted before, or another run's steps came in between.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_mixed(seed, step))
        yield


def _mixed(seed: int, step: int) -> int:
    """63 bits; unrelated for neighbouring seeds and steps."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
