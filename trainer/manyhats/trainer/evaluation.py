"""The held-out loss, by the decoder that trains."""

from __future__ import annotations

from collections.abc import Callable

import torch

from manyhats.trainer.adapter import TrainableAdapter
from manyhats.trainer.data import Dataset, collate, evaluation_batches
from manyhats.trainer.gradients import LossModel
from manyhats.trainer.settings import OptimizationSettings


@torch.no_grad()
def held_out_loss(
    decoder: LossModel,
    adapter: TrainableAdapter | None,
    held_out: Dataset,
    settings: OptimizationSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """The mean cross-entropy over all target tokens, in nats, without dropout.

    Args:
        decoder: the base.
        adapter: None is the base alone.
        held_out: the rows.
        settings: how large a batch may be.
        on_progress: told after each batch how many of the rows are done; what it raises ends the evaluation.
    """
    lowered = None if adapter is None else adapter.lowered()
    total, num_done = 0.0, 0
    for rows in evaluation_batches(held_out.rows, settings):
        total += decoder.loss(collate(rows), lowered).item()
        num_done += len(rows)
        on_progress(num_done, len(held_out.rows))
    return total / held_out.rows.num_targets
