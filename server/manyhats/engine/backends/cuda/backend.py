"""Triton's kernels as a backend: a row's bits depend on that row alone."""

from __future__ import annotations

import torch

from manyhats.engine.backends.cuda.adapters.layout import LargestSizes
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
from manyhats.engine.backends.cuda.graphs import Capture, CapturingOnGpu
from manyhats.engine.backends.cuda.model import CudaModel, Device
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.dtypes import block_bytes
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.memory import cache_bytes_left
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress, no_progress

LARGEST = LargestSizes(rank=1024, bottleneck=2048)
"""What adapters may have at most; four of the largest rank that a server takes by default, stacked."""
_CPU = Device(runtime_on(torch.device("cpu")), sm=90, num_processors=1)


class CudaBackend:
    """``Backend`` by Triton's kernels; on the CPU, which tests use, these run in Triton's interpreter.

    Args:
        device: ``cuda``, or ``cpu``.
        limits: of the engine.
        capture: records steps as graphs; by default that of a GPU, and none on the CPU.
    """

    def __init__(self, device: str, limits: Limits, capture: Capture | None = None) -> None:
        self._device = _CPU if device == "cpu" else _found(torch.device(device))
        is_cuda = self._device.torch.type == "cuda"
        self._capture = capture or (CapturingOnGpu(self._device.torch) if is_cuda else None)
        self._limits = limits
        self._model: CudaModel | None = None  # the last one prepared

    @property
    def name(self) -> str:
        """``cuda``."""
        return "cuda"

    @property
    def has_own_memory(self) -> bool:
        """A GPU has."""
        return True

    @property
    def runs_ahead(self) -> bool:
        """Yes: a plan's tokens are read on the device."""
        return True

    def prepare(
        self, architecture: Architecture, weights: Weights, progress: Progress = no_progress
    ) -> CudaModel:
        """Packs the weights, and allocates what steps work in."""
        self._model = CudaModel(architecture, weights, self._device, self._limits, LARGEST, self._capture)
        return self._model

    def new_cache(
        self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int | None
    ) -> CudaKVCache:
        """An empty cache of bfloat16, whose spare block comes on top."""
        if dtype != "bfloat16":
            raise ModelError(
                f"CUDA's kernels keep keys and values in bfloat16, not {dtype}; give --kv-cache-dtype bfloat16, "
                "or --invariance fast"
            )
        if num_bytes is None:
            num_bytes = self._left(block_size, dtype)
        num_blocks = num_bytes // block_bytes(architecture, block_size, dtype)
        return CudaKVCache(architecture, num_blocks, block_size, self._device.torch)

    def _left(self, block_size: int, dtype: str) -> int:
        if self._model is None or self._device.torch.type != "cuda":
            raise ModelError("the KV cache needs a size: what is left is known of a GPU with a model alone")
        slots = self._slots(self._model.architecture, 1, 0)
        num_bytes = cache_bytes_left(
            self, self._model, slots, block_size, dtype, self._limits, self._device.torch
        )
        self._model.forget()
        return num_bytes

    def _slots(self, architecture: Architecture, num_slots: int, num_bytes: int) -> CudaAdapterSlots:
        return CudaAdapterSlots(architecture, num_slots, num_bytes, LARGEST, self._device.runtime)

    def new_adapters(self, architecture: Architecture, num_slots: int, dtype: str) -> CudaAdapterSlots:
        """Empty slots, of adapters in bfloat16, and the device's memory for these."""
        return self._slots(architecture, num_slots, self._limits.adapter_bytes)

    def start_thread(self) -> None:
        """Nothing to prepare."""

    def leave_processors(self, count: int) -> None:
        """Does nothing."""


def _found(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    sm = 10 * properties.major + properties.minor
    return Device(runtime_on(device), sm, properties.multi_processor_count)
