"""What a check finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.gpu.scale import Shape

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Check:
    """How far a kernel is off.

    Attributes:
        kernel: its number and name.
        error: ``‖Δ‖ / ‖expected‖``, or the share of values that are not the same.
        tolerance: 0 where values must be the same.
    """

    kernel: str
    error: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        """False of a NaN."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Place:
    """Where checks run, and on what sizes."""

    shape: Shape
    device: torch.device
    sm: int

    def normal(self, seed: int, *size: int, scale: float = 1.0) -> Tensor:
        """Random values, float32."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device) * scale

    def poisoned(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is not written shows."""
        return torch.full(size, NAN, dtype=dtype, device=self.device)


class Checks(Protocol):
    """Some kernels' checks."""

    def __call__(self, place: Place) -> Iterator[Check]:
        """Run them, one after another."""
        ...


def off(found: Tensor, expected: Tensor) -> float:
    """``‖Δ‖ / ‖expected‖`` in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def differing(found: Tensor, expected: Tensor) -> float:
    """The share of values that are not the same."""
    return float((found != expected).double().mean())
