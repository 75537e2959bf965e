"""The backend that the engine's tests run on.

``pytest --backend torch`` runs them on another than the default, row by row, and ``--backend torch-batched`` on all
rows at once; with ``MANYHATS_DEVICE=cuda`` both run all rows at once on the GPU. ``--backend torch-ahead`` runs them
row by row and one step ahead, and so those of the loop without a model.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cpu.model import CpuModel
from manyhats.engine.backends.open import open_backend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.backends.torch.batched.model import BatchedModel
from manyhats.engine.backends.torch.model import TorchModel
from support.fakes.ahead import AheadBackend

DEVICE = os.environ.get("MANYHATS_DEVICE", "cpu")


def _name() -> str:
    """Read when it is asked for: this module may be imported ahead of pytest's options."""
    return os.environ.get("ENGINE_TEST_BACKEND", "cpu")


def ahead_seed() -> int | None:
    """When a loop without a model computes its steps; None if it does not run ahead."""
    return 0 if _name() == "torch-ahead" else None


def is_batched(name: str = "") -> bool:
    """Whether the rounding of a row may depend on the others of its step; of the tests' backend, or another."""
    name = name or _name()
    return name == "torch-batched" or (name == "torch" and DEVICE != "cpu")


def batched_backend(dtype: str = "float32") -> Backend:
    """All rows at once in plain torch, on the device under test."""
    return TorchBackend(DEVICE, dtype, by_row=False)


def named_backend(name: str, dtype: str = "float32", num_threads: int = 1) -> Backend:
    """One of those that ``--backend`` names."""
    if is_batched(name):
        return batched_backend(dtype)
    if name == "torch-ahead":
        return AheadBackend(TorchBackend(by_row=True))
    return open_backend(name, dtype=dtype, num_threads=num_threads)


def default_backend(dtype: str = "float32", num_threads: int = 1) -> Backend:
    """A new one; tiny kernels on several threads are slow where other processes run too."""
    return named_backend(_name(), dtype, num_threads)


def default_model() -> Any:
    """The class of its models, whose ``forward`` a test may spoil."""
    if is_batched():
        return BatchedModel
    return CpuModel if _name() == "cpu" else TorchModel


def assert_alike(found: Any, expected: Any, backend: str = "") -> None:
    """Equal to the bit, unless the tests' backend, or another, runs all rows at once: then up to rounding."""
    if is_batched(backend):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert np.array_equal(found, expected)
