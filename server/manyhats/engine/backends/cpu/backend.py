"""The CPU as a backend: Numba's kernels, and a thread for each processor."""

from __future__ import annotations

from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.compile import counted_compilation
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.model import CpuModel
from manyhats.engine.backends.dtypes import block_bytes, cache_dtype, torch_dtype
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress, no_progress

_VECTOR_PAIR = 16
"""Cells and head values are handled sixteen at a time."""


class CpuBackend:
    """``Backend`` on the CPU.

    Args:
        num_threads: of the kernels; None is one per core.
        is_exact: False lets NF4 linears run in 16-bit integers where the processor has instructions for it.
    """

    def __init__(self, num_threads: int | None = None, *, is_exact: bool = True) -> None:
        self._kernels = CpuKernels(num_threads, is_exact=is_exact)

    @property
    def name(self) -> str:
        """Which kernels run the NF4 linears."""
        return "cpu-int16" if self._kernels.uses_int16 else "cpu-numba"

    @property
    def has_own_memory(self) -> bool:
        """No."""
        return False

    @property
    def runs_ahead(self) -> bool:
        """No: a forward returns once it is computed."""
        return False

    def prepare(
        self, architecture: Architecture, weights: Weights, progress: Progress = no_progress
    ) -> CpuModel:
        """Packs the weights; a library's packed ones are checked against the kernel, which may have to be compiled."""
        with counted_compilation(progress):
            return CpuModel(architecture, weights, self._kernels)

    def new_cache(
        self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int | None
    ) -> CpuKVCache:
        """An empty cache.

        Raises:
            ModelError: the block size or the head is not a multiple of 16, or no size is given.
        """
        if num_bytes is None:
            raise ModelError("the KV cache needs a size: the CPU has no memory of its own")
        head_dim = architecture.attention.head_dim
        if block_size % _VECTOR_PAIR or head_dim % _VECTOR_PAIR:
            raise ModelError(
                f"the CPU kernels need a block size (here {block_size}) and a head size (here {head_dim}) that are "
                f"multiples of {_VECTOR_PAIR}"
            )
        num_blocks = num_bytes // block_bytes(architecture, block_size, dtype)
        return CpuKVCache(architecture, num_blocks, block_size, cache_dtype(dtype))

    def new_adapters(self, architecture: Architecture, num_slots: int, dtype: str) -> CpuAdapterSlots:
        """Empty slots."""
        return CpuAdapterSlots(architecture, num_slots, torch_dtype(dtype), self._kernels.linear)

    def start_thread(self) -> None:
        """Gives the calling thread the kernels' number of threads, and other threads of the process one of torch's."""
        self._kernels.start_thread()

    def leave_processors(self, count: int) -> None:
        """Uses no more threads from now on than the processors left over can run, but at least one."""
        self._kernels.leave_processors(count)
