"""Inputs that adapters rescale for one linear of several which read them."""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.triton.deltas import VARYING, vector


@triton.jit(do_not_specialize=[*VARYING, "first"])
def scaled_input(
    x, scaled, rows, slots, num_rows, records, RECORD, at, first, K, BLOCK: tl.constexpr
):  # fmt: skip
    """``scaled[i] = x[row] ⊙ factors`` of the row at place ``first + i``, or x[row] without factors.

    x [N, K] and scaled [i, K] bfloat16; rows, slots [places] int32; factors [K] float32, or 0 for none.

    Grid: (i, K / BLOCK).
    """
    i, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if first + i < tl.load(num_rows):
        word = records + tl.load(slots + first + i) * RECORD + at
        row = tl.load(rows + first + i).to(tl.int64)
        v = tl.load(x + row * K + k, mask=k < K, other=0.0)
        if tl.load(word) != 0:
            v = (v.to(tl.float32) * tl.load(vector(word) + k, mask=k < K, other=0.0)).to(tl.bfloat16)
        tl.store(scaled + i.to(tl.int64) * K + k, v, mask=k < K)


@triton.jit(do_not_specialize=[*VARYING, "first", "START", "SIZE"])
def put_outputs(
    found, y, rows, slots, num_rows, records, RECORD, at, first, Y_STRIDE, START, SIZE, BLOCK: tl.constexpr
):  # fmt: skip
    """``y[row] = found[i]`` in SIZE columns from START, of rows at places ``first + i`` that have factors.

    found [i, Y_STRIDE] and y [N, Y_STRIDE] float32 or bfloat16; the others as in ``scaled_input``.

    Grid: (i, SIZE / BLOCK).
    """
    i, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if first + i < tl.load(num_rows):
        word = records + tl.load(slots + first + i) * RECORD + at
        if tl.load(word) != 0:
            row, mine = tl.load(rows + first + i).to(tl.int64), c < SIZE
            v = tl.load(found + i.to(tl.int64) * Y_STRIDE + START + c, mask=mine, other=0.0)
            tl.store(y + row * Y_STRIDE + START + c, v, mask=mine)
