"""Linears of all experts at once, each on its own pairs, which ``routing.sort_pairs`` has cut into tiles.

Weights are found by a table of addresses. K is summed in steps of ``BK`` from zero, in ascending order, so a pair's
result is the same in any tile.
"""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.triton.dense_linear import range_of_dense
from manyhats.engine.backends.cuda.triton.nf4_linear import range_of_nf4

WORDS = tl.constexpr(7)
"""Addresses in an expert's row of the table."""


@triton.jit
def pairs_of_tile(tiles, pairs, t, RB: tl.constexpr):
    """A tile's expert, its pairs, and which of RB there are."""
    first, count, i = tl.load(tiles + t * 3 + 1), tl.load(tiles + t * 3 + 2), tl.arange(0, RB)
    return tl.load(tiles + t * 3), tl.load(pairs + first + i, mask=i < count, other=0), i < count


@triton.jit
def address(word, to: tl.constexpr):
    """A word of the table as a pointer."""
    return tl.multiple_of(tl.load(word).to(tl.pointer_type(to)), 16)


@triton.jit(do_not_specialize=["STEPS"])
def nf4_experts(
    x, table, pairs, tiles, num_tiles, y, N, STEPS, X_STRIDE, Y_STRIDE,
    TOP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr,
    IS_NESTED: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """``y[pair] = x[pair // TOP] W̃ᵀ``, W̃ of the pair's expert as in ``nf4_linear``.

    x bfloat16, rows ``X_STRIDE`` apart; y [pairs, N] bfloat16 or float32, rows ``Y_STRIDE`` apart; table [E, WORDS]
    int64: addresses of packed, absmax, nested, nested_code, code, first_block and row_offset.

    Grid: (tiles, N / BN).
    """
    t, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    if t < tl.load(num_tiles):
        expert, pair, is_row = pairs_of_tile(tiles, pairs, t, RB)
        words, is_weight = table + expert * WORDS, n < N
        packed, code = address(words, tl.uint8), address(words + 4, tl.float32)
        if IS_NESTED:
            first = tl.load(address(words + 5, tl.int32) + n, mask=is_weight, other=0)
            offset = tl.load(address(words + 6, tl.float32) + n, mask=is_weight, other=0.0)
            total = range_of_nf4(
                x, packed, address(words + 1, tl.uint8), address(words + 2, tl.float32),
                address(words + 3, tl.float32), code, n, pair // TOP, is_weight, is_row, first, offset, 0, N,
                STEPS, X_STRIDE, K, BK, RB, BN, GATHERS,
            )  # fmt: skip
        else:
            total = range_of_nf4(
                x, packed, address(words + 1, tl.float32), None, None, code, n, pair // TOP, is_weight, is_row,
                None, None, 0, N, STEPS, X_STRIDE, K, BK, RB, BN, GATHERS,
            )  # fmt: skip
        to = y + pair.to(tl.int64)[None, :] * Y_STRIDE + n[:, None]
        tl.store(to, total.to(y.dtype.element_ty), mask=is_row[None, :] & is_weight[:, None])


@triton.jit(do_not_specialize=["STEPS"])
def dense_experts(
    x, table, pairs, tiles, num_tiles, y, N, STEPS, X_STRIDE, Y_STRIDE,
    TOP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same of bfloat16 weights [N, K], whose address is the first of an expert's row of the table.

    Grid: (tiles, N / BN).
    """
    t, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    if t < tl.load(num_tiles):
        expert, pair, is_row = pairs_of_tile(tiles, pairs, t, RB)
        is_weight, weight = n < N, address(table + expert * WORDS, tl.bfloat16)
        total = range_of_dense(
            x, weight, n, pair // TOP, is_weight, is_row, 0, STEPS, X_STRIDE, K, BK, RB, BN
        )
        to = y + pair.to(tl.int64)[None, :] * Y_STRIDE + n[:, None]
        tl.store(to, total.to(y.dtype.element_ty), mask=is_row[None, :] & is_weight[:, None])
