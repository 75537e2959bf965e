"""Linears whose weights are bfloat16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def range_of_dense(
    x, weight, n, m, is_weight, is_row, start, STEPS, X_STRIDE,
    K: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums of the products of ``STEPS · BK`` values of K from step ``start``, [BN, RB] float32, from zero."""
    k = tl.arange(0, BK)
    row = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    column = x + m.to(tl.int64)[None, :] * X_STRIDE + k[:, None]
    total = tl.zeros((BN, RB), tl.float32)
    for step in range(start, start + STEPS):
        in_weight, in_row = is_weight[:, None], is_row[None, :]
        if K % BK:
            is_inside = step * BK + k < K
            in_weight, in_row = in_weight & is_inside[None, :], in_row & is_inside[:, None]
        w = tl.load(row + step * BK, mask=in_weight, other=0.0)
        total = tl.dot(w, tl.load(column + step * BK, mask=in_row, other=0.0), total)
    return total


@triton.jit(do_not_specialize=["M", "STEPS"])
def dense_linear(
    x, weight, bias, y, M, N, STEPS, X_STRIDE, Y_STRIDE,
    K: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``y = x Wᵀ + bias``, summed in float32, K ascending; the bits of ``nf4_linear`` where the weights are equal.

    Args:
        x: [M, K] bf16; rows ``X_STRIDE`` apart.
        weight: [N, K] bf16.
        bias: [N] float32, or None.
        y: [M, N] bf16 or float32, rows ``Y_STRIDE`` apart; where ``IS_SPLIT``, [SPLITS, M, N] float32 without bias.

    The grid is (⌈M / RB⌉, ⌈N / BN⌉, SPLITS if IS_SPLIT else 1).
    """
    m = tl.program_id(0) * RB + tl.arange(0, RB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    is_row, is_weight = m < M, n < N
    to, start = y, 0
    if IS_SPLIT:
        to += tl.program_id(2).to(tl.int64) * M * N
        start = tl.program_id(2) * STEPS
    if IS_SPLIT or SPLITS == 1:
        total = range_of_dense(x, weight, n, m, is_weight, is_row, start, STEPS, X_STRIDE, K, BK, RB, BN)
    else:
        total = tl.zeros((BN, RB), tl.float32)
        for s in range(SPLITS):
            total += range_of_dense(
                x, weight, n, m, is_weight, is_row, s * STEPS, STEPS, X_STRIDE, K, BK, RB, BN
            )
    if bias is not None:
        total += tl.load(bias + n, mask=is_weight, other=0.0)[:, None]
    to += m.to(tl.int64)[None, :] * Y_STRIDE + n[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=is_row[None, :] & is_weight[:, None])
