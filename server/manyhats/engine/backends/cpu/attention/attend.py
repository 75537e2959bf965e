"""Attention over paged keys and values, read in place.

A context is cut into parts at fixed positions. Each part is a softmax by itself, of which the largest score and the sum
of the weights are kept; then the parts' sums are merged in order. So parts can be computed at the same time or one
after the other, by one thread or many, and a row's result depends on its positions alone: not on how its prompt was
chunked, nor on the rows beside it. Weights are powers of two, and scores are scaled for that.
"""

from __future__ import annotations

import math

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import array_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.attention.products import ROWS, rows_at_once, score_rows, sum_rows
from manyhats.engine.backends.cpu.attention.tiles import WIDTH
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.int8 import scale_cells
from manyhats.engine.backends.cpu.rowwise import scale_row
from manyhats.engine.backends.cpu.simd import (
    add,
    exp2,
    fma,
    load,
    max_lanes,
    maximum,
    mul,
    prefetch,
    splat,
    store,
    sub,
    sum_lanes,
    tanh,
    zero,
)
from manyhats.engine.backends.cpu.team import next_share
from manyhats.engine.backends.cpu.wide import LANES as WIDE
from manyhats.engine.backends.cpu.wide import load as load_wide
from manyhats.engine.backends.cpu.wide import splat as splat_wide
from manyhats.engine.backends.cpu.wide import store as store_wide
from manyhats.engine.backends.cpu.wide import zero as zero_wide

PART = 256
"""Positions of a part, less if blocks do not fill it, more if a block is larger."""

LOG2_E = np.float32(math.log2(math.e))
LOWEST = np.float32(np.finfo(np.float32).min)
"""The largest score where nothing is seen; infinity less infinity would be no number."""


def part_cells(block_size: int) -> int:
    """Positions of a part: whole blocks."""
    return max(PART // block_size, 1) * block_size


def record_size(head_dim: int) -> int:
    """Float32 values that say what a query made of a part: its sums, its largest score, its total weight."""
    return head_dim + 8


def num_scratch_values(block_size: int, head_dim: int, num_queries: int) -> int:
    """Float32 values that a thread needs for a unit of so many queries of a KV head."""
    return ROWS * (part_cells(block_size) + WIDTH + head_dim + record_size(head_dim)) + 2 * num_queries


_part_cells, _record_size = inner(part_cells), inner(record_size)


@inner
def weigh_row(w, at, first, last, begin, end, limit):
    """Turns a row's scores into weights 2^(score − largest), 0 where it does not see.

    Args:
        w: scores are w[at + first : at + last], whole sixteens; with a limit they are yet to be capped.
        begin, end: what the row sees of them.
        limit: c · log₂ e of cap(x) = c · tanh(x / c), or 0.

    Returns:
        The largest score, and the sum of the weights.
    """
    if limit > 0.0:
        limits = splat(limit)
        for i in range(at + first, at + last, 8):
            store(w, i, mul(tanh(load(w, i)), limits))
    for i in range(at + first, at + min(begin, last)):
        w[i] = -np.inf
    for i in range(at + max(end, first), at + last):
        w[i] = -np.inf
    top = splat_wide(LOWEST)
    for i in range(at + first, at + last, WIDE):
        top = maximum(load_wide(w, i), top)
    largest = max_lanes(top)
    shift = splat_wide(largest)
    total = zero_wide()
    for i in range(at + first, at + last, WIDE):
        weight = exp2(sub(load_wide(w, i), shift))
        store_wide(w, i, weight)
        total = add(total, weight)
    return largest, sum_lanes(total)


@inner
def begin_row(sums, at, head_dim, state, index):
    """Nothing seen so far: no sums at ``at``, no weight at ``index`` of the state."""
    state[index] = LOWEST
    state[index + 1] = 0.0
    for i in range(at, at + head_dim, 8):
        store(sums, i, zero())


@inner
def merge_row(out, at, head_dim, state, index, records, record):
    """Adds a part to what a row has so far: out · 2^(old largest − new) + sums · 2^(the part's largest − new).

    Args:
        out: the row's sums from ``at`` on.
        state: its largest score and total weight at ``index``.
        records: the part's from ``record`` on; see ``record_size``.
    """
    before, largest = state[index], records[record + head_dim]
    after = largest if largest > before else before
    keep, take = exp2(splat(before - after)), exp2(splat(largest - after))
    for i in range(0, head_dim, 8):
        store(out, at + i, fma(load(records, record + i), take, mul(load(out, at + i), keep)))
    total = records[record + head_dim + 1]
    state[index] = after
    state[index + 1] = state[index + 1] * max_lanes(keep) + total * max_lanes(take)


@inner
def first_seen(end, span):
    """The first position that a row sees whose sight ends before ``end``; a span of 0 is none: it sees all."""
    return max(0, end - span) if span > 0 else 0


@inner
def sight(row, context, window, sees_all):
    """Where the sight of a tile's first row ends, how long it is at most, and how much further each next row sees.

    A sight may end behind the context, which then ends it.
    """
    if not sees_all:
        return row + 1, window, np.int64(1)
    if window == 0:
        return context, window, np.int64(0)
    return row + window, 2 * window - 1, np.int64(1)


@inner
def copy_scaled(x, at, size, factor, out, out_at):
    """out[out_at:] = x[at : at + size] · factor."""
    factors = splat(factor)
    for i in range(0, size, 8):
        store(out, out_at + i, mul(load(x, at + i), factors))


@inner
def ask_for(array, address, start, count):
    """Asks for some of an array's values ahead of their use; the products ask for those of the blocks that follow."""
    first = address + start * array.itemsize
    for place in range(first, first + count * array.itemsize, 64):
        prefetch(place)


@inner
def attend_rows(queries, start, rows, part, factors, blocks, shape, cached, scratch, at, records, record):
    """Some query rows of a tile over one part.

    Args:
        queries: (array, where those of the tile's first token begin, from one token to the next, queries of a token,
            where the first token's sight ends, its span, how much further each next token sees: 1, or 0; and where
            the context ends).
        start, rows: the rows within the tile, token by token.
        part: its first position.
        factors: of the queries, and ``weigh_row``'s limit.
        blocks: of the part; see ``products``.
        shape: head size, block size, positions of a part.
        cached: keys and values, their addresses, their scales, and where the head's scales begin.
        scratch: from ``at`` on.
        records: written from ``record`` on, one for each row.
    """
    x, x_at, width, group, end, span, advance, context = queries
    head_dim, block_size, size = shape
    keys, values, keys_address, values_address, key_scales, value_scales, first_scale = cached
    lowest = end + start // group * advance
    highest = min(end + (start + rows - 1) // group * advance, context)
    first = max(first_seen(lowest, span) - part, 0) // block_size * block_size
    last = min(highest - part, size)
    if first >= last:
        for row in range(rows):
            place = record + row * _record_size(head_dim)
            begin_row(records, place, head_dim, records, place + head_dim)
        return
    stride, padded = size + WIDTH, (last + WIDTH - 1) // WIDTH * WIDTH
    q = at + ROWS * stride
    for row in range(rows):
        token = (start + row) // group
        source = x_at + token * width + (start + row - token * group) * head_dim
        copy_scaled(x, source, head_dim, factors[0], scratch, q + row * head_dim)
    score_rows(rows, scratch, q, head_dim, keys, blocks, block_size, first, padded, scratch, at, stride)
    table, entry, factor, offset = blocks
    seen = table, entry + first // block_size, factor, offset
    scales = table, entry, block_size, first_scale
    scale_cells(keys, scratch, at, stride, rows, first, padded, key_scales, scales, block_size)
    if start == 0:
        ask_for(values, values_address, table[seen[1]] * factor + offset, block_size * head_dim)
    for row in range(rows):
        own = end + (start + row) // group * advance - part
        place = record + row * _record_size(head_dim) + head_dim
        records[place], records[place + 1] = weigh_row(
            scratch, at + row * stride, first, padded,
            first_seen(own + part, span) - part, min(own, context - part), factors[1],
        )  # fmt: skip
    scale_cells(values, scratch, at, stride, rows, first, padded, value_scales, scales, block_size)
    if start == 0 and highest > part + size:
        ask_for(
            keys, keys_address, table[entry + size // block_size] * factor + offset, block_size * head_dim
        )
    sum_rows(
        rows, scratch, at + first, stride, values, seen, block_size, head_dim, last - first, records, record,
        _record_size(head_dim),
    )  # fmt: skip


@inner
def begin_tile(target, num_rows, head_dim, scratch, state):
    """Nothing seen so far by any row of a tile."""
    for index in range(num_rows):
        begin_row(target[0], place_of(target, index, head_dim), head_dim, scratch, state + 2 * index)


@inner
def place_of(target, index, head_dim):
    """Where a tile's row is in the output: (array, place of the first token, size of a row, queries of a token)."""
    token = index // target[3]
    return target[1] + token * target[2] + (index - token * target[3]) * head_dim


@inner
def merge_rows(target, start, rows, head_dim, scratch, state, records, record):
    """Adds a part to what some rows of a tile have so far."""
    for row in range(rows):
        index = start + row
        merge_row(
            target[0], place_of(target, index, head_dim), head_dim,
            scratch, state + 2 * index, records, record + row * _record_size(head_dim),
        )  # fmt: skip


@inner
def end_tile(target, num_rows, head_dim, scratch, state):
    """Divides each row's sums by its total weight."""
    for index in range(num_rows):
        total = scratch[state + 2 * index + 1]
        scale_row(target[0], place_of(target, index, head_dim), head_dim, np.float32(1.0) / total)


@inner
def attend_parts(parts, tile, head, factors, frame, cached, scratch, at, state, records, record, is_whole):
    """Some parts of a tile at one KV head.

    Args:
        parts: the first, and one past the last.
        tile: its queries, output, number of rows, sequence.
        state: where in scratch the rows' largest scores and total weights are, if ``is_whole``.
        records: else a part's begin at ``record``, plus [part, Hkv, rows] of the tile.
    """
    queries, target, num_rows, sequence = tile
    num_kv_heads, head_dim, block_size = frame[col.NUM_KV_HEADS], frame[col.HEAD_DIM], frame[col.BLOCK_SIZE]
    size, width, span = _part_cells(block_size), _record_size(head_dim), block_size * head_dim
    table, entry = ints_at(frame[col.BLOCK_TABLES]), sequence * frame[col.MAX_BLOCKS]
    for part in range(parts[0], parts[1]):
        blocks = table, entry + part * size // block_size, span, head * frame[col.NUM_BLOCKS] * span
        start = np.int64(0)
        while start < num_rows:
            rows = rows_at_once(num_rows - start)
            place = record if is_whole else record + (part * num_kv_heads * num_rows + start) * width
            attend_rows(
                queries, start, rows, part * size, factors, blocks, (head_dim, block_size, size), cached,
                scratch, at, records, place,
            )  # fmt: skip
            if is_whole:
                merge_rows(target, start, rows, head_dim, scratch, state, records, place)
            start += rows


@inner
def attend_one_part(part, tile, head, factors, frame, cached, scratch, at, record):
    """A tile whose whole context is one part, at one KV head; the same bits as by merging it with nothing."""
    queries, target, num_rows, sequence = tile
    head_dim, block_size = frame[col.HEAD_DIM], frame[col.BLOCK_SIZE]
    size, span = _part_cells(block_size), block_size * head_dim
    entry = sequence * frame[col.MAX_BLOCKS] + part * size // block_size
    blocks = ints_at(frame[col.BLOCK_TABLES]), entry, span, head * frame[col.NUM_BLOCKS] * span
    start = np.int64(0)
    while start < num_rows:
        rows = rows_at_once(num_rows - start)
        attend_rows(
            queries, start, rows, part * size, factors, blocks, (head_dim, block_size, size), cached,
            scratch, at, scratch, record,
        )  # fmt: skip
        for row in range(rows):
            place = record + row * _record_size(head_dim)
            factor = np.float32(1.0) / scratch[place + head_dim + 1]
            copy_scaled(scratch, place, head_dim, factor, target[0], place_of(target, start + row, head_dim))
        start += rows


@inner
def attend(op, numbers, share, frame, buffers, like, scratch, at):
    """Out = softmax(cap(q Kᵀ · scale)) V, causal or over all, of the query rows of one unit at one KV head.

    Args:
        op: source rows are rotated queries, keys, values; target rows [H·K].
        numbers: scale of the scores; c in cap(x) = c · tanh(x / c), 0 for no cap.
        share: unit · Hkv + KV head; for units see ``columns``.
        frame, buffers: of the step.
        like: an array of the cache's dtype.
        scratch: from ``at`` on, as many values as ``num_scratch_values`` says.
    """
    num_kv_heads, head_dim = frame[col.NUM_KV_HEADS], frame[col.HEAD_DIM]
    unit = ints_at(frame[col.UNITS] + 4 * col.UNIT_SIZE * (share // num_kv_heads))
    head, out_width = share % num_kv_heads, op[col.OUT_SIZE]
    group = out_width // head_dim // num_kv_heads
    query_start, sequence = ints_at(frame[col.QUERY_START]), np.int64(unit[col.UNIT_SEQUENCE])
    row = np.int64(query_start[sequence] + unit[col.UNIT_FIRST_ROW])
    context = np.int64(ints_at(frame[col.CONTEXT_LEN])[sequence])
    position = context - query_start[sequence + 1] + row
    end, span, advance = sight(position, context, op[col.WINDOW], op[col.SEES_ALL])
    first_query, num_rows = head * group * head_dim, np.int64(unit[col.UNIT_ROWS]) * group
    x, out = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    queries = x, row * op[col.SIZE] + first_query, op[col.SIZE], group, end, span, advance, context
    target = out, row * out_width + first_query, out_width, group
    tile = queries, target, num_rows, sequence
    factors = numbers[0] * LOG2_E, np.float32(0.0)
    if numbers[1] > 0.0:
        factors = numbers[0] / numbers[1], numbers[1] * LOG2_E
    layer = op[col.LAYER] * frame[col.LAYER_BYTES]
    keys, values = frame[col.KEYS] + layer, frame[col.VALUES] + layer
    scales = 4 * op[col.LAYER] * frame[col.LAYER_SCALES]
    cached = (
        array_at(keys, like),
        array_at(values, like),
        keys,
        values,
        floats_at(frame[col.KEY_SCALES] + scales),
        floats_at(frame[col.VALUE_SCALES] + scales),
        head * frame[col.NUM_BLOCKS] * frame[col.BLOCK_SIZE],
    )
    size, width = _part_cells(frame[col.BLOCK_SIZE]), _record_size(head_dim)
    own = at + ROWS * (size + WIDTH + head_dim)
    state = own + ROWS * width
    last = min(end + (unit[col.UNIT_ROWS] - 1) * advance, context)
    first_part, last_part = first_seen(end, span) // size, (last - 1) // size + 1
    parts = (
        max(np.int64(unit[col.UNIT_FIRST_PART]), first_part),
        min(np.int64(unit[col.UNIT_LAST_PART]), last_part),
    )
    if unit[col.UNIT_COUNT] == 1 and parts[1] - parts[0] == 1:
        attend_one_part(parts[0], tile, head, factors, frame, cached, scratch, at, own)
        return
    if unit[col.UNIT_COUNT] == 1:
        begin_tile(target, num_rows, head_dim, scratch, state)
        attend_parts(parts, tile, head, factors, frame, cached, scratch, at, state, scratch, own, True)
        end_tile(target, num_rows, head_dim, scratch, state)
        return
    records = floats_at(frame[col.RECORDS])
    record = (np.int64(unit[col.UNIT_RECORD]) * num_kv_heads * group + head * num_rows) * width
    attend_parts(parts, tile, head, factors, frame, cached, scratch, at, state, records, record, False)
    if is_last(unit, num_kv_heads, head, frame):
        begin_tile(target, num_rows, head_dim, scratch, state)
        for part in range(first_part, last_part):
            place = record + part * num_kv_heads * num_rows * width
            merge_rows(target, np.int64(0), num_rows, head_dim, scratch, state, records, place)
        end_tile(target, num_rows, head_dim, scratch, state)


@inner
def is_last(unit, num_kv_heads, head, frame):
    """Whether this was the last of a tile's units to end at a head; then the next layer counts from zero again."""
    finished = longs_at(frame[col.FINISHED])
    index = np.int64(unit[col.UNIT_TILE]) * num_kv_heads + head
    if next_share(finished, index) < unit[col.UNIT_COUNT] - 1:
        return False
    finished[index] = 0
    return True
