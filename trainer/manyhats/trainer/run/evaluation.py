"""The held-out loss, computed by the training decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.data.batch import collate
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.sampler import evaluation_batches
from manyhats.trainer.run.gradients import LossModel
from manyhats.trainer.settings.settings import OptimizationSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def in_float32(adapter: LoweredAdapter, device: torch.device) -> LoweredAdapter:
    """An adapter as it was saved, for the training decoder: every value exact, in float32."""
    prefix = None if adapter.prefix is None else _converted(adapter.prefix, device)
    return replace(
        adapter, deltas=tuple(_converted(delta, device) for delta in adapter.deltas), prefix=prefix
    )


Primitive = TypeVar("Primitive", bound="DataclassInstance")


def _converted(primitive: Primitive, device: torch.device) -> Primitive:
    values = {each.name: getattr(primitive, each.name) for each in fields(primitive)}
    return replace(
        primitive,
        **{
            name: value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
            for name, value in values.items()
            if isinstance(value, Tensor)
        },
    )


@torch.no_grad()
def held_out_loss(
    decoder: LossModel,
    adapter: LoweredAdapter | None,
    held_out: Dataset,
    settings: OptimizationSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """The mean cross-entropy over all target tokens, in nats, without dropout.

    Args:
        decoder: the base.
        adapter: None for the base alone.
        held_out: the rows.
        settings: how large a batch may be.
        on_progress: called after each batch with the number of rows done; an exception from it ends the evaluation.
    """
    total, num_done = 0.0, 0
    for rows in evaluation_batches(held_out.rows, settings):
        total += decoder.loss(collate(rows), adapter).item()
        num_done += len(rows)
        on_progress(num_done, len(held_out.rows))
    return total / held_out.rows.num_targets
