"""What kernels act on: caches and adapter slots of the backend that they belong to."""

from __future__ import annotations

from typing import Any

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.dtypes import torch_dtype
from manyhats.engine.model.architecture import Architecture
from support.oracles.operations import ReferenceKVCache, ReferenceSlots


def new_cache(kernels: Any, architecture: Architecture, num_blocks: int, block_size: int, dtype: str) -> Any:
    """An empty cache."""
    kind = CpuKVCache if isinstance(kernels, CpuKernels) else ReferenceKVCache
    return kind(architecture, num_blocks, block_size, torch_dtype(dtype))


def new_slots(kernels: Any, architecture: Architecture, num_slots: int, dtype: str) -> Any:
    """Empty slots."""
    if isinstance(kernels, CpuKernels):
        return CpuAdapterSlots(
            architecture, num_slots, torch_dtype(dtype), kernels.num_threads, kernels.linear
        )
    return ReferenceSlots(architecture, torch_dtype(dtype))


def put(slots: Any, slot: int, adapter: LoweredAdapter) -> None:
    """Pack and place an adapter."""
    slots.place(slot, slots.pack(adapter))
