"""The end of a linear whose K was cut into ranges."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def reduce_splits(parts, bias, y, M, N, Y_STRIDE, SPLITS: tl.constexpr, B: tl.constexpr):
    """``y = Σ_s parts[s] + bias``, added in the order of s, from zero.

    Args:
        parts: [SPLITS, M, N] float32.
        bias: [N] float32, or None.
        y: [M, N] bf16 or float32; rows ``Y_STRIDE`` apart.

    The grid is (⌈N / B⌉, M).
    """
    m, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * B + tl.arange(0, B)
    is_inside = n < N
    total = tl.zeros((B,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(parts + (s * M + m) * N + n, mask=is_inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=is_inside, other=0.0)
    tl.store(y + m * Y_STRIDE + n, total.to(y.dtype.element_ty), mask=is_inside)
