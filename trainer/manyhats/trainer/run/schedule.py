"""What a step's number decides: the learning rate, as a fraction of its peak, and with the seed its random numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
