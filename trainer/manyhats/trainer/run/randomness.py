"""Random numbers for one step, which depend only on the run's seed and the step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
