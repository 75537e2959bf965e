"""Plain torch as a backend, on any device that torch knows."""

from __future__ import annotations

import torch

from manyhats.engine.backends.dtypes import block_bytes, cache_dtype, torch_dtype
from manyhats.engine.backends.torch.adapters import TorchAdapterSlots
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.model import TorchModel
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress, no_progress


class TorchBackend:
    """``Backend`` in float32 arithmetic, slow and obvious.

    Args:
        device: such as ``cpu``.
    """

    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)

    def prepare(
        self, architecture: Architecture, weights: Weights, progress: Progress = no_progress
    ) -> TorchModel:
        """Dequantizes the weights."""
        return TorchModel(architecture, weights, self._device)

    def new_cache(
        self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int
    ) -> TorchKVCache:
        """An empty cache."""
        num_blocks = num_bytes // block_bytes(architecture, block_size, dtype)
        return TorchKVCache(architecture, num_blocks, block_size, cache_dtype(dtype), self._device)

    def new_adapters(self, architecture: Architecture, num_slots: int, dtype: str) -> TorchAdapterSlots:
        """Empty adapter slots."""
        return TorchAdapterSlots(torch_dtype(dtype), self._device)

    def start_thread(self) -> None:
        """Nothing to prepare."""

    def leave_processors(self, count: int) -> None:
        """Does nothing."""
