"""Random numbers of one step that depend on the run's seed and the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def step_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Within it torch's global generators are seeded from (seed, step); afterwards they are as they were.

    So dropout is the same whether a run was interrupted before, or another run's steps came in between.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_mixed(seed, step))
        yield


def _mixed(seed: int, step: int) -> int:
    """63 bits; neighbouring seeds and steps have nothing in common."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
