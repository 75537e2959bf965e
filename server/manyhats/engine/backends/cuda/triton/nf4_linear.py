"""Linears whose weights are NF4: the product itself, and the weights alone.

Weights lie in repacked blocks of 64: byte j of a block holds code j (high nibble) and code j + 32 (low). One block is
two dots of 32 along K, in order, with nothing to interleave.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def looked_up(code, codes, nibbles, GATHERS: tl.constexpr):
    """``code[nibbles]``, [BN, 32] float32, from memory or, with ``GATHERS``, from registers.

    ``codes`` is ``code`` [16] broadcast to [BN, 2, 16]: gathered by sixteens, a lookup is one shuffle within a warp.
    """
    if GATHERS:
        sixteens = tl.reshape(nibbles, (nibbles.shape[0], 2, 16))
        found = tl.reshape(tl.gather(codes, sixteens, 2), (nibbles.shape[0], 32))
    else:
        found = tl.load(code + nibbles)
    return found


@triton.jit
def group_scale(nested, first, is_weight, block):
    """``nested[(first + block) // 256]`` [BN]: the absmax of the absmaxes of a block; None for plain absmaxes."""
    group = nested
    if nested is not None:
        group = tl.load(nested + (first + block) // 256, mask=is_weight, other=0.0)
    return group


@triton.jit
def block_scale(absmax, nested, nested_code, group, offset, n, is_weight, block, N):
    """A block's absmax [BN], float32: ``nested_code[absmax] · group + offset`` in two roundings, or as it is."""
    scale = tl.load(absmax + block.to(tl.int64) * N + n, mask=is_weight, other=0)
    if nested is not None:
        scale = tl.load(nested_code + scale.to(tl.int32)) * group + offset
    return scale


@triton.jit
def decoded(row, code, codes, scale, is_weight, block, GATHERS: tl.constexpr):
    """The halves of a block's weights, ``bf16(code · scale)`` [BN, 32]; ``row`` [BN, 32] are addresses in block 0."""
    pair = tl.load(row + block * 32, mask=is_weight[:, None], other=0)
    first = looked_up(code, codes, (pair >> 4).to(tl.int32), GATHERS) * scale[:, None]
    second = looked_up(code, codes, (pair & 15).to(tl.int32), GATHERS) * scale[:, None]
    return first.to(tl.bfloat16), second.to(tl.bfloat16)


@triton.jit
def range_of_nf4(
    x, packed, absmax, nested, nested_code, code, n, m, is_weight, is_row, first, offset, start, N, STEPS, X_STRIDE,
    K: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """Sums of the products of ``STEPS · BK`` values of K from step ``start``, [BN, RB] float32, from zero."""
    j = tl.arange(0, 32)
    codes = tl.broadcast_to(tl.load(code + tl.arange(0, 16))[None, None, :], (BN, 2, 16))
    row = packed + n.to(tl.int64)[:, None] * (K // 2) + j[None, :]
    column = x + m.to(tl.int64)[None, :] * X_STRIDE + j[:, None]
    total = tl.zeros((BN, RB), tl.float32)
    for step in range(start, start + STEPS):
        # A row's blocks begin at a multiple of BK / 64, a power of two: those of one step share a group.
        group = group_scale(nested, first, is_weight, step * (BK // 64))
        for b in tl.static_range(BK // 64):
            block = step * (BK // 64) + b
            x0 = tl.load(column + block * 64, mask=is_row[None, :], other=0.0)
            x1 = tl.load(column + block * 64 + 32, mask=is_row[None, :], other=0.0)
            scale = block_scale(absmax, nested, nested_code, group, offset, n, is_weight, block, N)
            w0, w1 = decoded(row, code, codes, scale, is_weight, block, GATHERS)
            total = tl.dot(w0, x0, total)
            total = tl.dot(w1, x1, total)
    return total


@triton.jit(do_not_specialize=["M", "STEPS"])
def nf4_linear(
    x, packed, absmax, nested, nested_code, code, first_block, row_offset, bias, y, M, N, STEPS, X_STRIDE, Y_STRIDE,
    K: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """``y = x W̃ᵀ + bias``, ``W̃ = bf16(code · absmax)``, summed in float32, K ascending.

    K is cut into ``SPLITS`` ranges. Each has its own sum, and these are added in order: here, or by ``reduce_splits``
    where ``IS_SPLIT``, in which case ``y`` is [SPLITS, M, N] float32 and there is no bias. Both give the same bits.

    Args:
        x: [M, K] bf16; rows ``X_STRIDE`` apart.
        packed: [N, K / 2] u8, repacked.
        absmax: [K / 64, N]: u8, codes into ``nested_code``, or float32, the absmaxes as they are.
        nested: float32, one of 256 blocks of a linear; None for plain absmaxes, as the next one and the two rows'.
        nested_code: [256] float32.
        code: [16] float32.
        first_block: [N] i32; a weight row's first block, where ``nested`` has groups of 256.
        row_offset: [N] float32, the mean of the absmaxes of the row's linear.
        bias: [N] float32, or None.
        y: [M, N] bf16 or float32; rows ``Y_STRIDE`` apart.

    The grid is (⌈M / RB⌉, ⌈N / BN⌉, SPLITS if IS_SPLIT else 1): programs that read the same weights are neighbours.
    """
    m = tl.program_id(0) * RB + tl.arange(0, RB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    is_row, is_weight = m < M, n < N
    first, offset = first_block, row_offset
    if nested is not None:
        first = tl.load(first_block + n, mask=is_weight, other=0)
        offset = tl.load(row_offset + n, mask=is_weight, other=0.0)
    to, start = y, 0
    if IS_SPLIT:
        to += tl.program_id(2).to(tl.int64) * M * N
        start = tl.program_id(2) * STEPS
    if IS_SPLIT or SPLITS == 1:
        total = range_of_nf4(
            x, packed, absmax, nested, nested_code, code, n, m, is_weight, is_row, first, offset, start, N,
            STEPS, X_STRIDE, K, BK, RB, BN, GATHERS,
        )  # fmt: skip
    else:
        total = tl.zeros((BN, RB), tl.float32)
        for s in range(SPLITS):
            total += range_of_nf4(
                x, packed, absmax, nested, nested_code, code, n, m, is_weight, is_row, first, offset, s * STEPS, N,
                STEPS, X_STRIDE, K, BK, RB, BN, GATHERS,
            )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + n, mask=is_weight, other=0.0)[:, None]
    to += m.to(tl.int64)[None, :] * Y_STRIDE + n[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=is_row[None, :] & is_weight[:, None])


@triton.jit
def nf4_dequantize(
    packed, absmax, nested, nested_code, code, first_block, row_offset, weight, N,
    K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``weight = bf16(code · absmax)`` [N, K] bf16; the rest is as in ``nf4_linear``.

    The grid is (K / 64, ⌈N / BN⌉): a program has one block of BN rows.
    """
    block = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    is_weight = n < N
    first, offset = first_block, row_offset
    if nested is not None:
        first = tl.load(first_block + n, mask=is_weight, other=0)
        offset = tl.load(row_offset + n, mask=is_weight, other=0.0)
    j, at = tl.arange(0, 32), n.to(tl.int64)[:, None]
    codes = tl.broadcast_to(tl.load(code + tl.arange(0, 16))[None, None, :], (BN, 2, 16))
    group = group_scale(nested, first, is_weight, block)
    scale = block_scale(absmax, nested, nested_code, group, offset, n, is_weight, block, N)
    w0, w1 = decoded(packed + at * (K // 2) + j[None, :], code, codes, scale, is_weight, block, True)
    to = weight + at * K + block * 64 + j[None, :]
    tl.store(to, w0, mask=is_weight[:, None])
    tl.store(to + 32, w1, mask=is_weight[:, None])
