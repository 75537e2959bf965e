"""What the CPU backend can tell about this processor; nothing is compiled for it."""

from __future__ import annotations

from typing import Any

import numba

from manyhats.engine.backends.cpu.dense import instructions as dense
from manyhats.engine.backends.cpu.int16 import instructions as int16
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.simd import has_feature
from manyhats.engine.backends.report import KernelPath, ProcessorReport

_numba: Any = numba  # its members are made at run time
# LLVM's name of a feature → the vendors'.
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avxvnni": "AVX-VNNI",
    "avx512f": "AVX512-F",
    "avx512bw": "AVX512-BW",
    "avx512vnni": "AVX512-VNNI",
    "avx512bf16": "AVX512-BF16",
}


def report(*, num_threads: int | None, is_exact: bool) -> ProcessorReport:
    """The processor as ``CpuBackend`` with these arguments would use it."""
    kernels = CpuKernels(num_threads, is_exact=is_exact)
    return ProcessorReport(
        features=tuple(shown for name, shown in _FEATURES.items() if has_feature(name)),
        paths=(_nf4(kernels, is_exact), _dense(kernels, is_exact)),
        num_threads=kernels.num_threads,
        threads=_numba.threading_layer(),
    )


def _nf4(kernels: CpuKernels, is_exact: bool) -> KernelPath:
    work = "NF4 linears"
    if kernels.uses_int16:
        used = int16.instructions_used()
        is_best = int16.HAS_WIDE and "VNNI" in used
        return KernelPath(
            work, f"16-bit integers, {used}", faster="" if is_best else "a processor with AVX512-VNNI"
        )
    if is_exact and int16.has_instructions():
        return KernelPath(work, "float32", faster="--dtype bfloat16, with which they are 16-bit integers")
    return KernelPath(work, "float32", is_slow=True, faster="a processor with AVX2, or better AVX512-VNNI")


def _dense(kernels: CpuKernels, is_exact: bool) -> KernelPath:
    work = "dense linears"
    if kernels.uses_pairs:
        return KernelPath(work, "bfloat16, AVX512-BF16")
    path = "float32, AVX512-F" if dense.HAS_WIDE else "float32"
    if is_exact and dense.has_pairs():
        return KernelPath(work, path, faster="--dtype bfloat16, with which they are bfloat16")
    is_slow = not has_feature("avx2")
    return KernelPath(work, path, is_slow, faster="a processor with AVX512-BF16")
