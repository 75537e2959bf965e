"""K4: norms of whole rows, and of rows to which something is added first.

A program has one row, so a row's sums do not depend on how many there are.
"""

import triton
import triton.language as tl


@triton.jit
def _normed(
    x, is_value, weight, bias, i, EPS, D: tl.constexpr, IS_LAYER: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """``(x − μ) / √(mean((x − μ)²) + eps) · weight + bias`` of a row [BD], 0 beyond D; μ is 0 for an RMS norm."""
    if IS_LAYER:
        x = tl.where(is_value, x - tl.sum(x, 0) / D, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + EPS) * tl.load(weight + i, mask=is_value, other=0.0)
    return y + tl.load(bias + i, mask=is_value, other=0.0) if HAS_BIAS else y


@triton.jit
def norm(
    x, weight, bias, y, X_STRIDE, Y_STRIDE, EPS,
    D: tl.constexpr, BD: tl.constexpr, IS_LAYER: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The norm of each row.

    Args:
        x: [M, D] float32 or bfloat16, rows ``X_STRIDE`` apart.
        weight, bias: [D] float32.
        y: [M, D] float32 or bfloat16, rows ``Y_STRIDE`` apart; it may be x.
        EPS: added to the mean square.
        BD: D or more, a power of two.

    Grid: M.
    """
    row, i = tl.program_id(0), tl.arange(0, BD)
    is_value = i < D
    v = tl.load(x + row * X_STRIDE + i, mask=is_value, other=0.0).to(tl.float32)
    v = _normed(v, is_value, weight, bias, i, EPS, D, IS_LAYER, HAS_BIAS)
    tl.store(y + row * Y_STRIDE + i, v.to(y.dtype.element_ty), mask=is_value)


@triton.jit
def add_norm(
    stream, delta, weight, bias, y, DELTA_STRIDE, SCALE, EPS,
    D: tl.constexpr, BD: tl.constexpr, IS_LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS_SUM: tl.constexpr,
):  # fmt: skip
    """``stream += SCALE · delta``, then ``y = norm(stream)``.

    Args:
        stream: [M, D] float32; written if ``KEEPS_SUM``.
        delta: [M, D] float32 or bfloat16, rows ``DELTA_STRIDE`` apart.
        weight, bias: [D] float32.
        y: [M, D] float32 or bfloat16; without ``KEEPS_SUM`` it may be the stream.
        EPS: added to the mean square.
        BD: D or more, a power of two.

    Grid: M.
    """
    row, i = tl.program_id(0), tl.arange(0, BD)
    is_value = i < D
    v = tl.load(delta + row * DELTA_STRIDE + i, mask=is_value, other=0.0).to(tl.float32)
    v = tl.load(stream + row * D + i, mask=is_value, other=0.0) + v * SCALE
    if KEEPS_SUM:
        tl.store(stream + row * D + i, v, mask=is_value)
    v = _normed(v, is_value, weight, bias, i, EPS, D, IS_LAYER, HAS_BIAS)
    tl.store(y + row * D + i, v.to(y.dtype.element_ty), mask=is_value)
