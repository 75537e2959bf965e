"""Triton's interpreter, in which CUDA's kernels run on a CPU, repaired for bfloat16.

The interpreter of Triton 3.9 keeps bfloat16 as raw uint16: sums and dots work on the bits, and casts from float32
truncate. It is repaired here: casts round to the nearest even, and a dot widens its operands and takes steps of 16
along K, as the tensor cores do, each summed in float64 and rounded to float32. A row's sum then never depends on its
neighbours, so comparisons of bits say something of a kernel's structure: of tiles' anchors, masks and splits.

``TRITON_INTERPRET=1`` must be set before kernels are imported: ``@triton.jit`` asks for it once. Tests use it, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_STEP = 16
"""K of one tensor-core instruction on bfloat16."""


def repair() -> None:
    """Make bfloat16 right, and launches faster; once in a process."""
    _repair_bfloat16()
    _patch_language_once()


def _widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 as the bits of bfloat16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + half) >> 16).astype(np.uint16))


def _repair_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    old_cast = InterpreterBuilder.cast_impl
    old_between_floats = InterpreterBuilder.create_fp_to_fp
    old_dot = InterpreterBuilder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have == want == tl.bfloat16:
            return source
        if have == tl.bfloat16:
            wide = TensorHandle(_widened(source.data), tl.float32)
            return wide if want == tl.float32 else old_cast(self, wide, target)
        if want == tl.bfloat16:
            return TensorHandle(_rounded(source.data.astype(np.float32)), want)
        return old_cast(self, source, target)

    def between_floats(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return old_between_floats(self, source, target, rounding)

    def dot(self: Any, a: Any, b: Any, start: Any, precision: Any, max_imprecise: Any) -> Any:
        if a.data.ndim != 2 or a.data.dtype == np.int8:
            return old_dot(self, a, b, start, precision, max_imprecise)
        x, y = (_widened(v.data) if v.dtype.scalar == tl.bfloat16 else v.data for v in (a, b))
        total = start.data.astype(np.float32)
        for k in range(0, x.shape[1], _STEP):
            part = np.matmul(x[:, k : k + _STEP].astype(np.float64), y[k : k + _STEP].astype(np.float64))
            total = (total + part).astype(np.float32)
        return TensorHandle(total, start.dtype.scalar)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = between_floats
    InterpreterBuilder.create_fp_ext = cast
    InterpreterBuilder.create_fp_trunc = cast
    InterpreterBuilder.create_dot = dot


def _patch_language_once() -> None:
    """The language is made the interpreter's once a launch, not again at each call of a function within it."""
    from triton.runtime import interpreter

    patch, restore = interpreter._patch_builtin, interpreter._LangPatchScope.restore
    patched: set[Any] = set()

    def patch_once(package: Any, builder: Any, scope: Any) -> None:
        if package not in patched:
            patched.add(package)
            patch(package, builder, scope)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_builtin = patch_once
    interpreter._LangPatchScope.restore = restore_all
