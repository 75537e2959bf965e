"""The learning rate of each step, as a share of its peak."""

from __future__ import annotations

import math

from manyhats.trainer.settings.settings import OptimizationSettings


def num_warmup_steps(settings: OptimizationSettings, num_steps: int) -> int:
    """Steps of the rise: as given, or ⌈share · all steps⌉ where ``warmup_steps`` is below 1."""
    warmup = settings.warmup_steps
    return math.ceil(warmup * num_steps) if warmup < 1 else round(warmup)


def learning_rate_factor(settings: OptimizationSettings, step: int, num_steps: int) -> float:
    """The share of the peak at ``step`` (from 0): (step + 1) / warmup while it rises, then 1 → 0 by the schedule.

    With p = (step − warmup) / (num_steps − warmup): 1 − p (linear), (1 + cos πp) / 2 (cosine), or 1. The peak is
    reached by the warm-up's last step and kept by the next, and no step has a rate of 0.
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
