"""What adapters do at linears: low-rank deltas of any mix of ranks, factors and offsets, and factors of inputs.

A program takes the rows of one segment, which have one adapter, and finds its matrices by the addresses in its record.
Launched with a fixed grid: how many segments there are is read on the device, and what has nothing to do returns.
"""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.record import ROW_VALUES, LinearWord

A = tl.constexpr(int(LinearWord.A))
B = tl.constexpr(int(LinearWord.B))
RANK = tl.constexpr(int(LinearWord.RANK))
SCALE = tl.constexpr(int(LinearWord.SCALE))
FACTORS = tl.constexpr(int(LinearWord.FACTORS))
OFFSETS = tl.constexpr(int(LinearWord.OFFSETS))
GATE = tl.constexpr(int(LinearWord.GATE))
WORDS = tl.constexpr(len(LinearWord))
PAD = tl.constexpr(ROW_VALUES)

VARYING = ("at", "RECORD", "T_ROWS")
"""Integers that change with the layer, or from step to step: no value of theirs is compiled for on its own."""


@triton.jit
def segment(segments, s):
    """Slot, first place and size of a segment."""
    return tl.load(segments + s * 3), tl.load(segments + s * 3 + 1), tl.load(segments + s * 3 + 2)


@triton.jit
def integer(word):
    """A word of a record as an int32."""
    return tl.load(word).to(tl.int32)


@triton.jit
def number(word):
    """A word of a record as a float32."""
    return tl.load(word.to(tl.pointer_type(tl.float32)))


@triton.jit
def matrix(word):
    """A word of a record as the address of a bfloat16 matrix."""
    return tl.multiple_of(tl.load(word).to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
def vector(word):
    """A word of a record as the address of a float32 vector."""
    return tl.multiple_of(tl.load(word).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def padded(size):
    """Values from one row of a matrix to the next."""
    return (size + PAD - 1) // PAD * PAD


@triton.jit
def shrunk(t, place, part, r, is_row, T_ROWS, RANKS, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """``x Aᵀ`` of rows [BM] and ranks [BR] as ``shrink`` left it, its ranges of K added in their order; float32.

    What a tile has beyond the rank is 0, so only rows are masked and ranks are read side by side.
    """
    total = tl.zeros((place.shape[0], r.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        at = ((split * T_ROWS + place)[:, None] * PARTS + part) * RANKS + r[None, :]
        total += tl.load(t + at, mask=is_row[:, None], other=0.0)
    return total


@triton.jit(do_not_specialize=VARYING)
def shrink(
    x, t, rows, segments, num_segments, records, RECORD, at, K, SPLIT, T_ROWS, RANKS,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, GATHERS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``t[split, place, part] = x[rows[place]] Aᵀ`` over one range of K.

    x [N, K] bfloat16, or without ``GATHERS`` [places, K]; t [SPLITS, T_ROWS, PARTS, RANKS] float32; rows [places]
    int32; segments [S, 3] int32; A [rank, K padded] bfloat16. Whole tiles of ranks are written, with zeros beyond the
    rank; where that is 0, t stays as it was. The ranges of K and BK follow from K alone, so a row's sums are the same
    in any segment.

    Grid: (segments, PARTS, SPLITS · RANKS / BR).
    """
    s, part = tl.program_id(0), tl.program_id(1)
    split, rank0 = tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS * BR
    if s < tl.load(num_segments):
        slot, first, count = segment(segments, s)
        entry = records + slot * RECORD + at + part * WORDS
        rank = integer(entry + RANK)
        if rank0 < rank:
            a, stride = matrix(entry + A), padded(K)
            i, r = tl.arange(0, BM), rank0 + tl.arange(0, BR)
            place = first + i
            row = tl.load(rows + place, mask=i < count, other=0) if GATHERS else place
            total = tl.zeros((BM, BR), tl.float32)
            for k0 in range(split * SPLIT, tl.minimum(K, (split + 1) * SPLIT), BK):
                k = k0 + tl.arange(0, BK)
                X = tl.load(
                    x + row[:, None] * K + k[None, :], mask=(i < count)[:, None] & (k < K)[None, :], other=0.0
                )
                W = tl.load(
                    a + r[None, :] * stride + k[:, None],
                    mask=(r < rank)[None, :] & (k < K)[:, None],
                    other=0.0,
                )
                total = tl.dot(X, W, total)
            to = ((split * T_ROWS + place)[:, None] * PARTS + part) * RANKS + r[None, :]
            tl.store(t + to, total, mask=(i < count)[:, None])


@triton.jit(do_not_specialize=VARYING)
def expand(
    t, y, gates, rows, segments, num_segments, records, RECORD, at, Y_STRIDE, SIZE0, SIZE1, SIZE2, T_ROWS, RANKS,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """``y[row] = y[row] · factors + offsets + scale · (Σ t[:, place, part]) B`` in the columns of each part.

    t as ``shrink`` left it; y [N, Y_STRIDE] bfloat16 or float32, the parts side by side, SIZE0 … SIZE2 columns each;
    gates [places, GATES] float32, with the factor of a part's scale or, without a B, of y, where it has a gate; GATES
    is 0 if no part has; B [rank, size padded] bfloat16; the sum of t is rounded to bfloat16.

    Grid: (segments, PARTS, largest size / BN).
    """
    s, part, column0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BN
    size = tl.where(part == 0, SIZE0, tl.where(part == 1, SIZE1, SIZE2))
    start = tl.where(part == 0, 0, tl.where(part == 1, SIZE0, SIZE0 + SIZE1))
    if (s < tl.load(num_segments)) & (column0 < size):
        slot, first, count = segment(segments, s)
        entry = records + slot * RECORD + at + part * WORDS
        rank = integer(entry + RANK)
        has_factors, has_offsets = tl.load(entry + FACTORS) != 0, tl.load(entry + OFFSETS) != 0
        has_gate = False
        if GATES > 0:
            has_gate = tl.load(entry + GATE) != 0
        if (rank > 0) | has_factors | has_offsets | has_gate:
            i, c = tl.arange(0, BM), column0 + tl.arange(0, BN)
            place = first + i
            row = tl.load(rows + place, mask=i < count, other=0)
            mine = (i < count)[:, None] & (c < size)[None, :]
            to = y + row[:, None] * Y_STRIDE + start + c[None, :]
            changed = tl.load(to, mask=mine, other=0.0).to(tl.float32)
            gate = tl.full((BM,), 1.0, tl.float32)
            if has_gate:
                gate = tl.load(gates + place * GATES + part, mask=i < count, other=0.0)
            if rank == 0:
                changed *= gate[:, None]
            if has_factors:
                changed *= tl.load(vector(entry + FACTORS) + c, mask=c < size, other=0.0)[None, :]
            if has_offsets:
                changed += tl.load(vector(entry + OFFSETS) + c, mask=c < size, other=0.0)[None, :]
            if rank > 0:
                b, stride = matrix(entry + B), padded(size)
                total = tl.zeros((BM, BN), tl.float32)
                for r0 in range(0, rank, BR):
                    r = r0 + tl.arange(0, BR)
                    T = shrunk(t, place, part, r, i < count, T_ROWS, RANKS, PARTS, SPLITS)
                    W = tl.load(
                        b + r[:, None] * stride + c[None, :],
                        mask=(r < rank)[:, None] & (c < size)[None, :],
                        other=0.0,
                    )
                    total = tl.dot(T.to(tl.bfloat16), W, total)
                changed += total * (number(entry + SCALE) * gate)[:, None]
            tl.store(to, changed.to(y.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=VARYING)
def scale_inputs(
    x, rows, segments, num_segments, records, RECORD, at, K, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """``x[row] = x[row] ⊙ factors`` in place; x [N, K] bfloat16 or float32, factors [K] float32, or 0 for none.

    Grid: (segments, K / BK).
    """
    s, k = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    if s < tl.load(num_segments):
        slot, first, count = segment(segments, s)
        word = records + slot * RECORD + at
        if tl.load(word) != 0:
            factors = tl.load(vector(word) + k, mask=k < K, other=0.0)
            i = tl.arange(0, BM)
            row = tl.load(rows + first + i, mask=i < count, other=0)
            mine = (i < count)[:, None] & (k < K)[None, :]
            to = x + row[:, None] * K + k[None, :]
            scaled = tl.load(to, mask=mine, other=0.0).to(tl.float32) * factors[None, :]
            tl.store(to, scaled.to(x.dtype.element_ty), mask=mine)
