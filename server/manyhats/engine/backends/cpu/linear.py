"""y = x Wᵀ + b for weights in NF4, bfloat16 or float32, whatever the number of rows.

A panel of weight rows is decoded to float32 in a thread's own scratch, then multiplied with the rows of x,
four at a time. Each output is one chain of fused multiply-adds per lane over k, then a fixed sum of lanes: it
is the same for a row alone and in any batch.
"""

from __future__ import annotations

from numba import types
from numba.extending import overload

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import bytes_at, floats_at, halves_at, ints_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.dense.linear import linear_dense
from manyhats.engine.backends.cpu.int16.linear import linear_by_int16
from manyhats.engine.backends.cpu.simd import decode_nf4, fma, mul, prefetch, splat, store, sum_lanes
from manyhats.engine.backends.cpu.wide import LANES, join, load, zero
from manyhats.engine.backends.cpu.wide import store as store_wide


def block_scale(absmax, row_offset, nested, nested_code, row, block):
    """The scale of one block of 64 codes; the dtype of ``absmax`` tells whether it is quantized itself."""
    raise TypeError("runs only inside a kernel")


@inner
def nested_scale(absmax, row_offset, nested, nested_code, row, block):
    """``nested_code[absmax] · nested + row_offset``, rounded at each step.

    bitsandbytes rounds the product and the sum one after the other too.
    """
    return splat(nested_code[absmax[block]] * nested[block >> 8] + row_offset[row])


@inner
def plain_scale(absmax, row_offset, nested, nested_code, row, block):
    """The absmax, which is a float32 value."""
    return splat(absmax[block])


@overload(block_scale)
def _block_scale(absmax, row_offset, nested, nested_code, row, block):
    return (nested_scale if absmax.dtype == types.uint8 else plain_scale).py_func


@inner
def decode_nf4_panel(weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, panel, at):
    """Rows first … first + count of an NF4 matrix as float32 into panel[at:]."""
    for row in range(first, first + count):
        source = row * (k // 2)
        block = row_block[row]
        for _ in range(k // 64):
            scale = block_scale(absmax, row_offset, nested, nested_code, row, block)
            block += 1
            for _ in range(2):
                v0, v1, v2, v3 = decode_nf4(weights, source)
                store(panel, at, mul(v0, scale))
                store(panel, at + 8, mul(v1, scale))
                store(panel, at + 16, mul(v2, scale))
                store(panel, at + 24, mul(v3, scale))
                source += 16
                at += 32


@inner
def decode_dense_panel(
    weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, panel, at
):
    """Rows first … first + count of a float32 or bfloat16 matrix as float32 into panel[at:]."""
    source = first * k
    for offset in range(0, count * k, LANES):
        store_wide(panel, at + offset, load(weights, source + offset))


def decode_panel(weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, panel, at):
    """Rows first … first + count as float32 into panel[at:]; the dtype of ``weights`` chooses how."""
    raise TypeError("runs only inside a kernel")


@overload(decode_panel)
def _decode_panel(weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, panel, at):
    return (decode_nf4_panel if weights.dtype == types.uint8 else decode_dense_panel).py_func


AHEAD = 4096
"""Bytes from a weight that is read in place to the one that is asked for meanwhile."""


@inner
def tile_4x3(x, x0, x1, x2, x3, w, w0, w1, w2, k, y, y0, y1, y2, y3, o1, o2, b0, b1, b2, ahead, bits):
    """Four rows of x times three rows of w, into y at columns 0, o1 and o2 after y0 … y3.

    Meanwhile three rows of weights of so many bits each are asked for, from the address ``ahead`` on.
    """
    a00 = a01 = a02 = a10 = a11 = a12 = a20 = a21 = a22 = a30 = a31 = a32 = zero()
    for i in range(0, k, LANES):
        prefetch(ahead + (3 * i * bits >> 3))
        u = load(w, w0 + i)
        v = load(w, w1 + i)
        t = load(w, w2 + i)
        r = load(x, x0 + i)
        a00 = fma(r, u, a00)
        a01 = fma(r, v, a01)
        a02 = fma(r, t, a02)
        r = load(x, x1 + i)
        a10 = fma(r, u, a10)
        a11 = fma(r, v, a11)
        a12 = fma(r, t, a12)
        r = load(x, x2 + i)
        a20 = fma(r, u, a20)
        a21 = fma(r, v, a21)
        a22 = fma(r, t, a22)
        r = load(x, x3 + i)
        a30 = fma(r, u, a30)
        a31 = fma(r, v, a31)
        a32 = fma(r, t, a32)
    y[y0] = sum_lanes(a00) + b0
    y[y0 + o1] = sum_lanes(a01) + b1
    y[y0 + o2] = sum_lanes(a02) + b2
    y[y1] = sum_lanes(a10) + b0
    y[y1 + o1] = sum_lanes(a11) + b1
    y[y1 + o2] = sum_lanes(a12) + b2
    y[y2] = sum_lanes(a20) + b0
    y[y2 + o1] = sum_lanes(a21) + b1
    y[y2 + o2] = sum_lanes(a22) + b2
    y[y3] = sum_lanes(a30) + b0
    y[y3 + o1] = sum_lanes(a31) + b1
    y[y3 + o2] = sum_lanes(a32) + b2


@inner
def tile_1x3(x, x0, w, w0, w1, w2, k, y, y0, o1, o2, b0, b1, b2, ahead, bits):
    """One row of x times three rows of w; the same arithmetic as in ``tile_4x3``."""
    a0 = a1 = a2 = zero()
    for i in range(0, k, LANES):
        prefetch(ahead + (3 * i * bits >> 3))
        r = load(x, x0 + i)
        a0 = fma(r, load(w, w0 + i), a0)
        a1 = fma(r, load(w, w1 + i), a1)
        a2 = fma(r, load(w, w2 + i), a2)
    y[y0] = sum_lanes(a0) + b0
    y[y0 + o1] = sum_lanes(a1) + b1
    y[y0 + o2] = sum_lanes(a2) + b2


@inner
def multiply_panel(x, num_rows, k, panel, at, first, count, bias, y, out, following, bits):
    """y[:, first : first + count] = x · panelᵀ + bias. Tiles at an edge repeat the last row or column.

    Meanwhile the panel at the address ``following`` is asked for, whose weights have so many bits.
    """
    row = 0
    while row < num_rows:
        tall = num_rows - row >= 3
        r1 = row + 1
        r2 = row + 2
        r3 = min(row + 3, num_rows - 1)
        for column in range(0, count, 3):
            o1 = min(1, count - 1 - column)
            o2 = min(2, count - 1 - column)
            w0 = at + column * k
            w1 = w0 + o1 * k
            w2 = w0 + o2 * k
            o = first + column
            b0 = bias[o]
            b1 = bias[o + o1]
            b2 = bias[o + o2]
            ahead = following + (column * k * bits >> 3)
            if tall:
                tile_4x3(
                    x, row * k, r1 * k, r2 * k, r3 * k, panel, w0, w1, w2, k,
                    y, row * out + o, r1 * out + o, r2 * out + o, r3 * out + o, o1, o2, b0, b1, b2,
                    ahead, bits,
                )  # fmt: skip
            else:
                tile_1x3(
                    x, row * k, panel, w0, w1, w2, k, y, row * out + o, o1, o2, b0, b1, b2, ahead, bits
                )  # fmt: skip
        row += 4 if tall else 1


def _accumulate_eights(x, i, weights, source, scale, total):
    v0, v1, v2, v3 = decode_nf4(weights, source)
    total = fma(load(x, i), mul(v0, scale), total)
    total = fma(load(x, i + 8), mul(v1, scale), total)
    total = fma(load(x, i + 16), mul(v2, scale), total)
    return fma(load(x, i + 24), mul(v3, scale), total)


def _accumulate_sixteens(x, i, weights, source, scale, total):
    v0, v1, v2, v3 = decode_nf4(weights, source)
    total = fma(load(x, i), join(mul(v0, scale), mul(v1, scale)), total)
    return fma(load(x, i + 16), join(mul(v2, scale), mul(v3, scale)), total)


accumulate_nf4 = inner(_accumulate_sixteens if LANES == 16 else _accumulate_eights)
"""Total + x[i : i + 32] · the 32 weights at ``source``, lane by lane in order."""


@inner
def multiply_row_nf4(
    x, weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, bias, y
):
    """y[first : first + count] = one row x times as many NF4 rows, decoded in registers, three side by side.

    The same arithmetic as ``decode_nf4_panel`` and ``tile_1x3``, without the way through memory.
    """
    for column in range(first, first + count, 3):
        c1 = min(column + 1, first + count - 1)
        c2 = min(column + 2, first + count - 1)
        a0 = a1 = a2 = zero()
        for i in range(0, k, 64):
            block = i >> 6
            s0 = block_scale(absmax, row_offset, nested, nested_code, column, row_block[column] + block)
            s1 = block_scale(absmax, row_offset, nested, nested_code, c1, row_block[c1] + block)
            s2 = block_scale(absmax, row_offset, nested, nested_code, c2, row_block[c2] + block)
            for j in range(i, i + 64, 32):
                a0 = accumulate_nf4(x, j, weights, (column * k + j) >> 1, s0, a0)
                a1 = accumulate_nf4(x, j, weights, (c1 * k + j) >> 1, s1, a1)
                a2 = accumulate_nf4(x, j, weights, (c2 * k + j) >> 1, s2, a2)
        y[column] = sum_lanes(a0) + bias[column]
        y[c1] = sum_lanes(a1) + bias[c1]
        y[c2] = sum_lanes(a2) + bias[c2]


@inner
def multiply_row_dense(
    x, weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, bias, y
):
    """y[first : first + count] = one row x times as many dense rows, read in place."""
    ahead = weights.ctypes.data + AHEAD
    bits = 8 * weights.itemsize
    for column in range(first, first + count, 3):
        o1 = min(1, first + count - 1 - column)
        o2 = min(2, first + count - 1 - column)
        w0 = column * k
        tile_1x3(
            x, 0, weights, w0, w0 + o1 * k, w0 + o2 * k, k,
            y, column, o1, o2, bias[column], bias[column + o1], bias[column + o2],
            ahead + (w0 * bits >> 3), bits,
        )  # fmt: skip


def multiply_row(x, weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, bias, y):
    """One row x times rows first … first + count; the dtype of ``weights`` chooses how."""
    raise TypeError("runs only inside a kernel")


@overload(multiply_row)
def _multiply_row(x, weights, absmax, row_block, row_offset, nested, nested_code, first, count, k, bias, y):
    return (multiply_row_nf4 if weights.dtype == types.uint8 else multiply_row_dense).py_func


@inner
def bits_of(kind):
    """Of a weight in memory."""
    if kind == col.FLOAT32:
        return 32
    return 16 if kind == col.BFLOAT16 else 4


@inner
def decode(op, first, count, panel, at):
    """Rows first … first + count of an instruction's weights as float32 into panel[at:]."""
    k = op[col.SIZE]
    kind = op[col.KIND]
    row_block, offset = ints_at(op[col.ROW_BLOCK]), floats_at(op[col.ROW_OFFSET])
    nested, code = floats_at(op[col.NESTED]), floats_at(op[col.NESTED_CODE])
    small, large = bytes_at(op[col.ABSMAX]), floats_at(op[col.ABSMAX])
    if kind == col.NESTED_NF4:
        weights = bytes_at(op[col.WEIGHTS])
        decode_panel(weights, small, row_block, offset, nested, code, first, count, k, panel, at)
    elif kind == col.PLAIN_NF4:
        weights = bytes_at(op[col.WEIGHTS])
        decode_panel(weights, large, row_block, offset, nested, code, first, count, k, panel, at)
    elif kind == col.BFLOAT16:
        halves = halves_at(op[col.WEIGHTS])
        decode_panel(halves, small, row_block, offset, nested, code, first, count, k, panel, at)
    else:
        floats = floats_at(op[col.WEIGHTS])
        decode_panel(floats, small, row_block, offset, nested, code, first, count, k, panel, at)


@inner
def multiply_one(op, x, first, count, y):
    """y[first : first + count] = one row x times as many rows of an instruction's weights, plus bias."""
    k = op[col.SIZE]
    kind = op[col.KIND]
    row_block, offset = ints_at(op[col.ROW_BLOCK]), floats_at(op[col.ROW_OFFSET])
    nested, code = floats_at(op[col.NESTED]), floats_at(op[col.NESTED_CODE])
    small, large = bytes_at(op[col.ABSMAX]), floats_at(op[col.ABSMAX])
    bias = floats_at(op[col.BIAS])
    if kind == col.NESTED_NF4:
        weights = bytes_at(op[col.WEIGHTS])
        multiply_row(x, weights, small, row_block, offset, nested, code, first, count, k, bias, y)
    elif kind == col.PLAIN_NF4:
        weights = bytes_at(op[col.WEIGHTS])
        multiply_row(x, weights, large, row_block, offset, nested, code, first, count, k, bias, y)
    elif kind == col.BFLOAT16:
        halves = halves_at(op[col.WEIGHTS])
        multiply_row(x, halves, small, row_block, offset, nested, code, first, count, k, bias, y)
    else:
        floats = floats_at(op[col.WEIGHTS])
        multiply_row(x, floats, small, row_block, offset, nested, code, first, count, k, bias, y)


@inner
def linear(op, source, target, num_rows, first, last, panel, at):
    """target[:, rows first … last of W] = source Wᵀ + bias.

    Args:
        op: the instruction that has the weights.
        source: address of rows, of a multiple of 64 values for NF4, of 16 otherwise; they are float32, unless the
            weights take integers or pairs of bfloat16.
        target: address of rows.
        num_rows: of source and target.
        first, last: rows of the weights.
        panel: from ``at`` on, scratch for decoded weights.
    """
    y = floats_at(target)
    if op[col.KIND] in (col.NF4_BY_INT16, col.INT8):
        linear_by_int16(op, ints_at(source), y, num_rows, first, last, panel, at)
        return
    if op[col.KIND] in (col.FLOAT32_GROUPS, col.BFLOAT16_GROUPS, col.BFLOAT16_PAIRS):
        linear_dense(op, ints_at(source), y, num_rows, first, last)
        return
    x = floats_at(source)
    if num_rows == 1:
        multiply_one(op, x, first, last - first, y)
        return
    for start in range(first, last, op[col.PANEL_ROWS]):
        count = min(op[col.PANEL_ROWS], last - start)
        decode(op, start, count, panel, at)
        k, bits = op[col.SIZE], bits_of(op[col.KIND])
        following = op[col.WEIGHTS] + ((start + count) * k * bits >> 3)
        bias, out = floats_at(op[col.BIAS]), op[col.NUM_OUT]
        multiply_panel(x, num_rows, k, panel, at, start, count, bias, y, out, following, bits)
