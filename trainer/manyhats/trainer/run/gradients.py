"""The gradients of one optimizer step, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.data import collate
from manyhats.trainer.data.batch import TokenizedRow, TrainingBatch
from manyhats.trainer.methods.adapter import TrainableAdapter
from manyhats.trainer.run.once_per_step import LoweredOnce


class LossModel(Protocol):
    """What a run needs from ``TrainingDecoder``."""

    def loss(self, batch: TrainingBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """The sum of the cross-entropies of the batch's targets."""
        ...


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The mean loss over a step's targets, and how many tokens it had."""

    loss: float
    num_tokens: int
    num_targets: int


def accumulate_gradients(
    decoder: LossModel, adapter: TrainableAdapter, micro_batches: Sequence[Sequence[TokenizedRow]]
) -> StepLoss:
    """Set the parameters' gradients to those of the mean loss over all target tokens of all micro-batches.

    So a step split into micro-batches equals one big batch, however the targets are spread over them.
    """
    num_targets = sum(row.num_targets for rows in micro_batches for row in rows)
    lowered = LoweredOnce(adapter.lowered())
    total, num_tokens = 0.0, 0
    for rows in micro_batches:
        batch = collate(rows)
        loss = decoder.loss(batch, lowered.adapter, dropout=adapter.dropout)
        (loss / num_targets).backward()
        total += loss.item()
        num_tokens += batch.num_row_tokens
    lowered.backward()
    return StepLoss(total / num_targets, num_tokens, num_targets)
