"""The learning rate of each step, as a fraction of its peak."""

from __future__ import annotations

import math

from manyhats.trainer.settings.settings import OptimizationSettings


def num_warmup_steps(settings: OptimizationSettings, num_steps: int) -> int:
    """Warm-up steps: as given, or ``⌈share · all steps⌉`` if ``warmup_steps`` is below 1."""
    warmup = settings.warmup_steps
    return math.ceil(warmup * num_steps) if warmup < 1 else round(warmup)


def learning_rate_factor(settings: OptimizationSettings, step: int, num_steps: int) -> float:
    """The fraction of the peak at ``step``, from 0: ``(step + 1) / warmup`` in the warm-up, then 1 → 0 by schedule.

    With ``p = (step − warmup) / (num_steps − warmup)``: ``1 − p`` (linear), ``(1 + cos πp) / 2`` (cosine), or 1. The
    last warm-up step and the one after it have the peak rate, and no step has a rate of 0.
    """
    warmup = num_warmup_steps(settings, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
