"""What adapters do at a group of linears, each row by its own: rescaled inputs, scales, offsets, low-rank deltas."""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.low_rank import expand, shrink
from manyhats.engine.backends.cpu.adapters.row_tiles import expand_rows, shrink_rows
from manyhats.engine.backends.cpu.adapters.texts import gate_of
from manyhats.engine.backends.cpu.addresses import bytes_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.dense.linear import multiply_dense, narrow_row
from manyhats.engine.backends.cpu.int16.linear import multiply_nf4
from manyhats.engine.backends.cpu.int16.quantize import quantize_row
from manyhats.engine.backends.cpu.linear import decode, tile_4x3
from manyhats.engine.backends.cpu.packing import GROUP_ROWS, RESCALED_ROWS
from manyhats.engine.backends.cpu.rowwise import copy_row, scale_row
from manyhats.engine.backends.cpu.simd import add, load, load_address, mul, store

# Columns of a group's table: the number of members; where each member's outputs start, and how many there are; the
# layers that have anything to do; and per layer, slot and member, addresses, ranks and scales, 0 for none. Which layers
# have gates, and their addresses.
(
    NUM_MEMBERS,
    STARTS,
    SIZES,
    HAS_DELTAS,
    HAS_INPUT_SCALES,
    A_ADDRESS,
    B_ADDRESS,
    RANKS,
    SCALES,
    SCALE_ADDRESS,
    OFFSET_ADDRESS,
    INPUT_SCALE_ADDRESS,
    HAS_GATES,
    GATE_ADDRESS,
) = range(14)
NUM_COLUMNS = 14

TILES_OF_THREAD = 4
"""With adapters: from so many on, a tile of rows is one share, whatever the number of members."""


@inner
def table_of(op, frame):
    """The table of an instruction's group."""
    return longs_at(frame[col.LINEAR_TABLES] + 8 * NUM_COLUMNS * op[col.GROUP])


@inner
def num_delta_shares(op, frame):
    """A share is a tile of rows at all members of a group, or at one of them if there are few tiles.

    An adapter's matrices lie in the order of members, so that for a whole row they are read in one go.
    """
    num_tiles = frame[col.NUM_DELTA_TILES]
    if num_tiles == 0:
        return 0
    table = table_of(op, frame)
    if not bytes_at(table[HAS_DELTAS])[op[col.LAYER]]:
        return 0
    return num_tiles if has_whole_rows(frame) else num_tiles * table[NUM_MEMBERS]


@inner
def has_whole_rows(frame):
    """Whether there are enough tiles of rows with an adapter for each to be one share."""
    return frame[col.NUM_DELTA_TILES] >= TILES_OF_THREAD * frame[col.NUM_THREADS]


@inner
def scale_span(y, at, size, address, like):
    """y[at : at + size] *= the float32 vector at ``address``."""
    for i in range(0, size, 8):
        store(y, at + i, mul(load(y, at + i), load_address(address + 4 * i, like)))


@inner
def shift_span(y, at, size, address, like):
    """y[at : at + size] += the float32 vector at ``address``."""
    for i in range(0, size, 8):
        store(y, at + i, add(load(y, at + i), load_address(address + 4 * i, like)))


@inner
def deltas(op, share, frame, buffers, like, scratch, at):
    """y = y · g · scale + offset, then y += g · scale · (x Aᵀ) B, for a tile of rows at one member or at all of them.

    Args:
        op: source holds x, target y; [N, d_in] and [N, d_out of all members].
        share: index of the tile, or that · members + member.
        frame, buffers: of the step.
        like: an array of the adapters' dtype.
        scratch: from ``at`` on, as many values for each row of a tile as the largest rank.
    """
    members = table_of(op, frame)[NUM_MEMBERS]
    if has_whole_rows(frame):
        for member in range(members):
            change_rows(op, share, member, frame, buffers, like, scratch, at)
    else:
        index = share // members
        change_rows(op, index, share - index * members, frame, buffers, like, scratch, at)


@inner
def change_rows(op, index, member, frame, buffers, like, scratch, at):
    """``deltas`` for the tile ``index``, whose rows have one adapter, at one member."""
    table = table_of(op, frame)
    tiles, rows = ints_at(frame[col.DELTA_TILES]), ints_at(frame[col.ADAPTER_ROWS])
    first, last = np.int64(tiles[index]), np.int64(tiles[index + 1])
    slot = ints_at(frame[col.ADAPTER_SLOTS])[first]
    entry = (op[col.LAYER] * frame[col.NUM_SLOTS] + slot) * table[NUM_MEMBERS] + member
    if op[col.GATES] == 0 or longs_at(table[GATE_ADDRESS])[entry] == 0:
        change_tile(op, first, last, member, entry, np.float32(1.0), False, frame, buffers, like, scratch, at)
        return
    # A tile's rows may be of several texts, each with its own gate.
    for place in range(first, last):
        gate = gate_of(op, np.int64(rows[place]), member, frame, buffers)
        change_tile(op, place, place + 1, member, entry, gate, True, frame, buffers, like, scratch, at)


@inner
def change_tile(op, first, last, member, entry, gate, is_gated, frame, buffers, like, scratch, at):
    """``change_rows`` for the places first … last of rows that have the same entry and gate."""
    table = table_of(op, frame)
    rows = ints_at(frame[col.ADAPTER_ROWS])
    x, y = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    d_in, out = op[col.SIZE], op[col.NUM_OUT]
    start, size = np.int64(ints_at(table[STARTS])[member]), np.int64(ints_at(table[SIZES])[member])
    scale = longs_at(table[SCALE_ADDRESS])[entry]
    offset = longs_at(table[OFFSET_ADDRESS])[entry]
    rank = np.int64(ints_at(table[RANKS])[entry])
    for place in range(first, last):
        row = np.int64(rows[place])
        if scale != 0:
            if is_gated:
                scale_row(y, row * out + start, size, gate)
            scale_span(y, row * out + start, size, scale, scratch)
        if offset != 0:
            shift_span(y, row * out + start, size, offset, scratch)
    if rank > 0:
        a, b = longs_at(table[A_ADDRESS])[entry], longs_at(table[B_ADDRESS])[entry]
        factor = floats_at(table[SCALES])[entry] * gate
        if last - first == 1:
            row = np.int64(rows[first])
            shrink(x, row * d_in, d_in, a, rank, like, scratch, at)
            expand(scratch, at, rank, b, size, like, factor, y, row * out + start)
        else:
            shrink_rows(x, rows, first, last, d_in, a, rank, like, scratch, at)
            expand_rows(scratch, at, rank, b, size, like, factor, y, rows, first, last, out, start)


@inner
def num_rescaled_shares(op, frame):
    """A share is a panel of the weights, of one member; each member's panels begin anew."""
    if frame[col.NUM_RESCALED_ROWS] == 0:
        return 0
    table = table_of(op, frame)
    members = table[NUM_MEMBERS]
    count = 0
    for member in range(members):
        if bytes_at(table[HAS_INPUT_SCALES])[op[col.LAYER] * members + member]:
            count += (ints_at(table[SIZES])[member] + op[col.PANEL_ROWS] - 1) // op[col.PANEL_ROWS]
    return count


@inner
def rescaled(op, share, frame, buffers, scratch, at):
    """The linear again, for one panel of weights, on the rows whose input an adapter rescales at the panel's member.

    Args:
        op: source holds x, target y.
        share: index of the panel among those of the rescaled members.
        frame, buffers: of the step.
        scratch: from ``at`` on, room for a panel and four rows of input.
    """
    table = table_of(op, frame)
    members = table[NUM_MEMBERS]
    for member in range(members):
        if bytes_at(table[HAS_INPUT_SCALES])[op[col.LAYER] * members + member]:
            panels = (ints_at(table[SIZES])[member] + op[col.PANEL_ROWS] - 1) // op[col.PANEL_ROWS]
            if share < panels:
                rescale_panel(op, member, share, table, frame, buffers, scratch, at)
                return
            share -= panels


@inner
def rescale_panel(op, member, index, table, frame, buffers, scratch, at):
    """``rescaled`` for the panel ``index`` of a member."""
    within = index * op[col.PANEL_ROWS]
    count = min(op[col.PANEL_ROWS], np.int64(ints_at(table[SIZES])[member]) - within)
    first = ints_at(table[STARTS])[member] + within
    if op[col.KIND] in (col.NF4_BY_INT16, col.FLOAT32_GROUPS, col.BFLOAT16_GROUPS, col.BFLOAT16_PAIRS):
        rescale_groups(op, member, first, count, table, frame, buffers, at)
        return
    decode(op, first, count, scratch, at)
    x, y, bias = (
        floats_at(buffers[op[col.SOURCE]]),
        floats_at(buffers[op[col.TARGET]]),
        floats_at(op[col.BIAS]),
    )
    k = op[col.SIZE]
    scaled = at + op[col.PANEL_ROWS] * k
    num_rows = frame[col.NUM_RESCALED_ROWS]
    for start in range(0, num_rows, 4):
        # Four rows at a time; past the end, the last one again.
        i1, i2, i3 = min(start + 1, num_rows - 1), min(start + 2, num_rows - 1), min(start + 3, num_rows - 1)
        y0 = scale_input(op, member, start, table, frame, x, scratch, scaled) + first
        y1 = scale_input(op, member, i1, table, frame, x, scratch, scaled + k) + first
        y2 = scale_input(op, member, i2, table, frame, x, scratch, scaled + 2 * k) + first
        y3 = scale_input(op, member, i3, table, frame, x, scratch, scaled + 3 * k) + first
        for column in range(0, count, 3):
            o1, o2 = min(1, count - 1 - column), min(2, count - 1 - column)
            w = at + column * k
            o = first + column
            tile_4x3(
                scratch, scaled, scaled + k, scaled + 2 * k, scaled + 3 * k,
                scratch, w, w + o1 * k, w + o2 * k, k,
                y, y0 + column, y1 + column, y2 + column, y3 + column, o1, o2, bias[o], bias[o + o1], bias[o + o2],
                0, 0,
            )  # fmt: skip


@inner
def rescale_groups(op, member, first, count, table, frame, buffers, at):
    """``rescaled`` for rows first … first + count of weights whose outputs are the lanes."""
    x, y = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    scratch = floats_at(frame[col.SCRATCH])
    k, width = op[col.SIZE], op[col.PANEL_ROWS]
    # Behind a decoded group, if there is one: results, inputs as the weights take them, one row's before that.
    result = at + (GROUP_ROWS // 2 * k if op[col.KIND] == col.NF4_BY_INT16 else 0)
    converted = result + RESCALED_ROWS * width
    scaled = converted + RESCALED_ROWS * k
    words = ints_at(frame[col.SCRATCH] + 4 * converted)
    # As if the panel were the first of a target that is as wide as it.
    out = floats_at(frame[col.SCRATCH] + 4 * (result - first))
    num_rows = frame[col.NUM_RESCALED_ROWS]
    for start in range(0, num_rows, RESCALED_ROWS):
        rows = min(RESCALED_ROWS, num_rows - start)
        for i in range(rows):
            if op[col.KIND] == col.NF4_BY_INT16:
                scale_input(op, member, start + i, table, frame, x, scratch, scaled)
                quantize_row(scratch, scaled, k, words, i)
            elif op[col.KIND] == col.BFLOAT16_PAIRS:
                scale_input(op, member, start + i, table, frame, x, scratch, scaled)
                narrow_row(scratch, scaled, k, words, i)
            else:
                scale_input(op, member, start + i, table, frame, x, scratch, converted + i * k)
        groups = first // GROUP_ROWS, (first + count) // GROUP_ROWS
        if op[col.KIND] == col.NF4_BY_INT16:
            multiply_nf4(op, words, rows, groups, out, width, scratch, at)
        else:
            multiply_dense(op, words, rows, groups, out, width)
        for i in range(rows):
            row = np.int64(ints_at(frame[col.RESCALED_ROWS])[start + i])
            copy_row(scratch, result + i * width, count, y, row * op[col.NUM_OUT] + first)


@inner
def scale_input(op, member, index, table, frame, x, scratch, at):
    """A row's input times its adapter's scale, if there is one here, into scratch[at:]; returns its place in y."""
    row = np.int64(ints_at(frame[col.RESCALED_ROWS])[index])
    slot = ints_at(frame[col.RESCALED_SLOTS])[index]
    entry = (op[col.LAYER] * frame[col.NUM_SLOTS] + slot) * table[NUM_MEMBERS] + member
    address = longs_at(table[INPUT_SCALE_ADDRESS])[entry]
    source = row * op[col.SIZE]
    for i in range(0, op[col.SIZE], 8):
        value = load(x, source + i)
        store(scratch, at + i, mul(value, load_address(address + 4 * i, x)) if address != 0 else value)
    return row * op[col.NUM_OUT]
