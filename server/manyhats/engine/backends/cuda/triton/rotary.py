"""K5: queries and keys normed and rotated, and keys and values put into their cells."""

import triton
import triton.language as tl


@triton.jit
def _statistics(
    x, head, HEADS, EPS, D: tl.constexpr, BD: tl.constexpr, SPANS_ROW: tl.constexpr, IS_LAYER: tl.constexpr
):  # fmt: skip
    """Mean (0 unless ``IS_LAYER``) and ``1 / √(mean((x − μ)²) + eps)``, of a head or of all; x [HEADS · D]."""
    d = tl.arange(0, BD)
    first, last = (0, HEADS) if SPANS_ROW else (head, head + 1)
    size = (last - first) * D
    mean = 0.0
    if IS_LAYER:
        total = tl.zeros((BD,), tl.float32)
        for each in range(first, last):
            total += tl.load(x + each * D + d, mask=d < D, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / size
    total = tl.zeros((BD,), tl.float32)
    for each in range(first, last):
        v = tl.where(d < D, tl.load(x + each * D + d, mask=d < D, other=0.0).to(tl.float32) - mean, 0.0)
        total += v * v
    return mean, tl.rsqrt(tl.sum(total, 0) / size + EPS)


@triton.jit
def _part(
    x, i, is_value, mean, scale, weight, bias, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Some values of a head, normed: ``(x − mean) · scale · weight + bias``, float32."""
    v = tl.load(x + i, mask=is_value, other=0.0).to(tl.float32)
    if HAS_NORM:
        v = (v - mean) * scale * tl.load(weight + i, mask=is_value, other=0.0)
        if HAS_BIAS:
            v = v + tl.load(bias + i, mask=is_value, other=0.0)
    return v


@triton.jit
def _rotated(
    x, y, head, HEADS, cos, sin, weight, bias, EPS,
    D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
    NORM: tl.constexpr, SPAN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One head of x [HEADS · D], normed and rotated, written to y [D]."""
    HAS_NORM: tl.constexpr = NORM != ""
    mean, scale = 0.0, 1.0
    if HAS_NORM:
        mean, scale = _statistics(x, head, HEADS, EPS, D, BD, SPAN == "row", NORM == "layer")
    if SPAN != "head":
        weight += head * D
        bias += head * D
    x += head * D
    if HALF > 0:
        i = tl.arange(0, BH)
        is_pair = i < HALF
        first = _part(x, i, is_pair, mean, scale, weight, bias, HAS_NORM, HAS_BIAS)
        second = _part(x, i + HALF, is_pair, mean, scale, weight, bias, HAS_NORM, HAS_BIAS)
        c, s = tl.load(cos + i, mask=is_pair, other=0.0), tl.load(sin + i, mask=is_pair, other=0.0)
        tl.store(y + i, (first * c - second * s).to(y.dtype.element_ty), mask=is_pair)
        tl.store(y + HALF + i, (second * c + first * s).to(y.dtype.element_ty), mask=is_pair)
    if 2 * HALF < D:
        j = 2 * HALF + tl.arange(0, BR)
        rest = _part(x, j, j < D, mean, scale, weight, bias, HAS_NORM, HAS_BIAS)
        tl.store(y + j, rest.to(y.dtype.element_ty), mask=j < D)


@triton.jit
def rotate_and_store(
    qkv, cos, sin, positions, cells, query_weight, query_bias, key_weight, key_bias, queries, keys, values,
    QKV_STRIDE, QUERY_EPS, KEY_EPS,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
    QUERY_NORM: tl.constexpr, QUERY_SPAN: tl.constexpr, QUERY_HAS_BIAS: tl.constexpr,
    KEY_NORM: tl.constexpr, KEY_SPAN: tl.constexpr, KEY_HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Of each head, normed: ``(a cos θ − b sin θ, b cos θ + a sin θ, rest)``, a and b of ``HALF`` values each.

    Queries go to ``queries``, keys so, and values as they are, to the rows' cells. Without fused multiply-adds these
    are the bits of the same in torch.

    Args:
        qkv: [N, (HQ + 2 HKV) · D] float32 or bfloat16, rows ``QKV_STRIDE`` apart.
        cos, sin: [positions, HALF] float32.
        positions: [N] int32.
        cells: [N] int64 or int32, block · block size + offset.
        query_weight, query_bias: [D], or [HQ · D] unless ``QUERY_SPAN`` is ``head``; float32. Those of keys likewise.
        queries: [N, HQ, D] bfloat16; no part of qkv.
        keys, values: [cells, HKV, D] bfloat16, of one layer.
        BD, BH, BR: powers of two, no less than D, HALF, and D − 2 HALF.
        QUERY_NORM: ``rms`` or ``layer``; empty for none. KEY_NORM likewise.
        QUERY_SPAN: what its means are over, a ``row``, or each ``head`` or ``own_head``.

    Grid: N, HQ + 2 HKV.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    x = qkv + row.to(tl.int64) * QKV_STRIDE
    cell = tl.load(cells + row).to(tl.int64) * HKV * D
    if head < HQ + HKV:
        position = tl.load(positions + row).to(tl.int64) * HALF
        if head < HQ:
            _rotated(
                x, queries + (row * HQ + head) * D, head, HQ, cos + position, sin + position,
                query_weight, query_bias, QUERY_EPS,
                D, BD, HALF, BH, BR, QUERY_NORM, QUERY_SPAN, QUERY_HAS_BIAS,
            )  # fmt: skip
        else:
            _rotated(
                x + HQ * D, keys + cell + (head - HQ) * D, head - HQ, HKV, cos + position, sin + position,
                key_weight, key_bias, KEY_EPS,
                D, BD, HALF, BH, BR, KEY_NORM, KEY_SPAN, KEY_HAS_BIAS,
            )  # fmt: skip
    else:
        d = tl.arange(0, BD)
        v = tl.load(x + head * D + d, mask=d < D, other=0.0)
        tl.store(values + cell + (head - HQ - HKV) * D + d, v.to(values.dtype.element_ty), mask=d < D)
