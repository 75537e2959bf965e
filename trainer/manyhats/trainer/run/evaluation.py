"""The held-out loss, computed by the training decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.trainer.data.batch import batch_of
from manyhats.trainer.data.sampler import TrainingRows, evaluation_batches
from manyhats.trainer.run.gradients import LossModel
from manyhats.trainer.settings.settings import OptimizationSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def in_float32(adapter: LoweredAdapter, device: torch.device) -> LoweredAdapter:
    """An adapter as it was saved, for the training decoder: every value exact, in float32."""
    prefix = None if adapter.prefix is None else _converted(adapter.prefix, device)
    head = adapter.head
    if head is not None:
        head = replace(head, layers=tuple(_converted(layer, device) for layer in head.layers))
    return replace(
        adapter,
        deltas=tuple(_converted(delta, device) for delta in adapter.deltas),
        prefix=prefix,
        head=head,
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
    held_out: TrainingRows,
    settings: OptimizationSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """The mean loss over all targets, without dropout; of tokens and classes in nats.

    Args:
        decoder: the base.
        adapter: None for the base alone.
        held_out: at least one row.
        settings: how large a batch may be.
        on_progress: called after each batch with the number of rows done; an exception from it ends the evaluation.
    """
    total, num_done = 0.0, 0
    for rows in evaluation_batches(held_out, settings):
        total += decoder.loss(batch_of(rows), adapter).item()
        num_done += len(rows)
        on_progress(num_done, len(held_out))
    return total / held_out.num_targets
