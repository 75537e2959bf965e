"""The backend that the engine's tests run on: ``pytest --backend torch`` runs them on another than the default."""

from __future__ import annotations

import os
from typing import Any

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cpu.model import CpuModel
from manyhats.engine.backends.open import open_backend
from manyhats.engine.backends.torch.model import TorchModel

_MODELS = {"cpu": CpuModel, "torch": TorchModel}


def _name() -> str:
    """Read when it is asked for: this module may be imported ahead of pytest's options."""
    return os.environ.get("ENGINE_TEST_BACKEND", "cpu")


def default_backend(dtype: str = "float32", num_threads: int = 1) -> Backend:
    """A new one; tiny kernels on several threads are slow where other processes run too."""
    return open_backend(_name(), dtype=dtype, num_threads=num_threads)


def default_model() -> Any:
    """The class of its models, whose ``forward`` a test may spoil."""
    return _MODELS[_name()]
