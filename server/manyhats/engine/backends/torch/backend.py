"""Plain torch as a backend: row by row on the CPU, all rows at once on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from manyhats.engine.backends.backend import AdapterSlots, Model
from manyhats.engine.backends.dtypes import block_bytes, cache_dtype, torch_dtype
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.memory import cache_bytes_left
from manyhats.engine.backends.torch.adapters import TorchAdapterSlots
from manyhats.engine.backends.torch.batched.adapters import DeviceAdapterSlots
from manyhats.engine.backends.torch.batched.model import BatchedModel
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.model import TorchModel
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress, no_progress


class TorchBackend:
    """``Backend`` in plain torch.

    On the CPU it is slow and obvious: float32, each row by itself. On a GPU all rows run at once, and NF4 weights stay
    as they are.

    Args:
        device: ``cpu``, or such as ``cuda``.
        dtype: of linears on all rows at once: ``bfloat16``, or ``float32`` for exact products.
        by_row: whether each row runs by itself; None for what the device is used with.
        limits: of the engine; without them the KV cache needs a size.
    """

    def __init__(
        self,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        by_row: bool | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._dtype = torch_dtype(dtype)
        self._by_row = self._device.type == "cpu" if by_row is None else by_row
        self._limits = limits
        self._model: BatchedModel | None = None  # the last one prepared

    @property
    def name(self) -> str:
        """The device's, if it is another than the CPU."""
        return "torch" if self._device.type == "cpu" else f"torch-{self._device.type}"

    @property
    def has_own_memory(self) -> bool:
        """A GPU has."""
        return self._device.type != "cpu"

    def prepare(
        self, architecture: Architecture, weights: Weights, progress: Progress = no_progress
    ) -> Model[Any, Any]:
        """Row by row, it dequantizes the weights; otherwise it copies them to the device."""
        if self._by_row:
            return TorchModel(architecture, weights)
        if self._device.type == "cuda":
            _compute_exactly()
        self._model = BatchedModel(architecture, weights, self._dtype, self._device)
        return self._model

    def new_cache(
        self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int | None
    ) -> TorchKVCache:
        """An empty cache.

        Raises:
            ModelError: nothing is left for it.
        """
        if num_bytes is None:
            num_bytes = self._left(block_size, dtype)
        return self._cache(architecture, block_size, dtype, num_bytes)

    def _cache(self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int) -> TorchKVCache:
        num_blocks = num_bytes // block_bytes(architecture, block_size, dtype)
        return TorchKVCache(architecture, num_blocks, block_size, cache_dtype(dtype), self._device)

    def _left(self, block_size: int, dtype: str) -> int:
        """Bytes left of the GPU's memory beside the model, its largest step with its own cache, and adapters."""
        if self._device.type == "cpu" or self._limits is None or self._model is None:
            raise ModelError("the KV cache needs a size: what is left is known of a GPU with a model alone")
        slots = DeviceAdapterSlots(torch.float32, torch.float32, torch.device("cpu"))  # which it has none in
        return cache_bytes_left(self, self._model, slots, block_size, dtype, self._limits, self._device)

    def new_adapters(self, architecture: Architecture, num_slots: int, dtype: str) -> AdapterSlots[Any]:
        """Empty adapter slots."""
        if self._by_row:
            return TorchAdapterSlots(torch_dtype(dtype))
        return DeviceAdapterSlots(torch_dtype(dtype), self._dtype, self._device)

    def start_thread(self) -> None:
        """Nothing to prepare."""

    def leave_processors(self, count: int) -> None:
        """Does nothing."""


def _compute_exactly() -> None:
    """Products of float32 in float32, and sums of bfloat16 in float32: torch may otherwise shorten both."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
