"""Attention over paged keys and values, read in place.

Each query row makes two passes: scores of all its positions into scratch, then their softmax times the values.
Positions are visited in order, one chain of multiply-adds each, so a row's result does not depend on how
its prompt was chunked, nor on the rows beside it.
"""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import array_at, floats_at, ints_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.rowwise import cap, scale_row
from manyhats.engine.backends.cpu.simd import (
    add,
    exp,
    fma,
    load,
    max_lanes,
    maximum,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
    zero,
)

MINUS_INFINITY = np.float32(-np.inf)


@inner
def tile_4x16(a, a0, a1, a2, a3, b, at, stride, count, c, c0, c1, c2, c3, fresh):
    """c[ci : ci + 16] (+)= Σ_t a[ai + t] · b[at + t·stride : … + 16], for four rows i; t in order."""
    if fresh:
        s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = zero()
    else:
        s00 = load(c, c0)
        s01 = load(c, c0 + 8)
        s10 = load(c, c1)
        s11 = load(c, c1 + 8)
        s20 = load(c, c2)
        s21 = load(c, c2 + 8)
        s30 = load(c, c3)
        s31 = load(c, c3 + 8)
    for t in range(count):
        low = load(b, at)
        high = load(b, at + 8)
        at += stride
        v = splat(a[a0 + t])
        s00 = fma(v, low, s00)
        s01 = fma(v, high, s01)
        v = splat(a[a1 + t])
        s10 = fma(v, low, s10)
        s11 = fma(v, high, s11)
        v = splat(a[a2 + t])
        s20 = fma(v, low, s20)
        s21 = fma(v, high, s21)
        v = splat(a[a3 + t])
        s30 = fma(v, low, s30)
        s31 = fma(v, high, s31)
    store(c, c0, s00)
    store(c, c0 + 8, s01)
    store(c, c1, s10)
    store(c, c1 + 8, s11)
    store(c, c2, s20)
    store(c, c2 + 8, s21)
    store(c, c3, s30)
    store(c, c3 + 8, s31)


@inner
def softmax_row(scores, at, first, last, padded, scale):
    """Turns scores[at + first : at + last] into unnormalized weights in place, 0 elsewhere below padded.

    Returns:
        1 / their sum.
    """
    for i in range(first):
        scores[at + i] = MINUS_INFINITY
    for i in range(last, padded):
        scores[at + i] = MINUS_INFINITY
    top = splat(MINUS_INFINITY)
    for i in range(0, padded, 8):
        top = maximum(load(scores, at + i), top)
    shift = splat(max_lanes(top))
    factor = splat(scale)
    total = zero()
    for i in range(0, padded, 8):
        weight = exp(mul(sub(load(scores, at + i), shift), factor))
        store(scores, at + i, weight)
        total = add(total, weight)
    return np.float32(1.0) / sum_lanes(total)


@inner
def cap_rows(scores, at, end, scale, limit):
    """scores[at : end] = limit · tanh(scores · scale / limit)."""
    factor = splat(scale)
    limits = splat(limit)
    for i in range(at, end, 8):
        store(scores, i, cap(mul(load(scores, i), factor), limits))


@inner
def first_seen(end, window):
    """The first position that a row sees whose last one is ``end - 1``; a window of 0 is none."""
    return max(0, end - window) if window > 0 else 0


@inner
def attend_rows(q, starts, ends, window, table, head, keys, values, shape, numbers, scores, at, out, targets):
    """Four query rows of one sequence and one KV head.

    Args:
        q: queries begin at ``starts``.
        ends: the positions that they see up to, exclusive.
        window: how many positions a row sees; 0 for all.
        table: (block tables, where the sequence's begins).
        head: KV head.
        keys, values: of the layer; ``shape`` is Hkv, K and the block size.
        numbers: scale of the scores, and their cap, or 0.
        scores: scratch from ``at`` on.
        out: written from ``targets`` on, unnormalized.

    Returns:
        What to multiply each row with.
    """
    num_kv_heads, head_dim, block_size = shape
    blocks, first_entry = table
    s0, scale = at, numbers[0]
    span = block_size * head_dim
    end = max(max(ends[0], ends[1]), max(ends[2], ends[3]))
    first_block = first_seen(min(min(ends[0], ends[1]), min(ends[2], ends[3])), window) // block_size
    base = first_block * block_size
    last_block = (end + block_size - 1) // block_size
    padded = last_block * block_size - base
    s1, s2, s3 = s0 + padded, s0 + 2 * padded, s0 + 3 * padded
    for index in range(first_block, last_block):
        block = (blocks[first_entry + index] * num_kv_heads + head) * span
        for lane in range(0, block_size, 16):
            c = index * block_size - base + lane
            tile_4x16(
                q, starts[0], starts[1], starts[2], starts[3], keys, block + lane, block_size, head_dim,
                scores, s0 + c, s1 + c, s2 + c, s3 + c, True,
            )  # fmt: skip
    if numbers[1] > 0.0:
        cap_rows(scores, s0, s3 + padded, scale, numbers[1])
        scale = np.float32(1.0)
    n0 = softmax_row(scores, s0, first_seen(ends[0], window) - base, ends[0] - base, padded, scale)
    n1 = softmax_row(scores, s1, first_seen(ends[1], window) - base, ends[1] - base, padded, scale)
    n2 = softmax_row(scores, s2, first_seen(ends[2], window) - base, ends[2] - base, padded, scale)
    n3 = softmax_row(scores, s3, first_seen(ends[3], window) - base, ends[3] - base, padded, scale)
    for index in range(first_block, last_block):
        block = (blocks[first_entry + index] * num_kv_heads + head) * span
        c = index * block_size - base
        count = min(block_size, end - index * block_size)
        for i in range(0, head_dim, 16):
            tile_4x16(
                scores, s0 + c, s1 + c, s2 + c, s3 + c, values, block + i, head_dim, count,
                out, targets[0] + i, targets[1] + i, targets[2] + i, targets[3] + i, index == first_block,
            )  # fmt: skip
    return n0, n1, n2, n3


@inner
def attend(op, numbers, unit, frame, buffers, cached, scratch, at):
    """Out = softmax(cap(q Kᵀ · scale)) V, causal, of the query rows of one tile at one KV head.

    Args:
        op: source rows are rotated queries, keys, values; target rows [H·K].
        numbers: scale of the scores; c in cap(x) = c · tanh(x / c), 0 for no cap.
        unit: tile · Hkv + KV head; a tile is a sequence, its first query row of the tile, their number.
        frame, buffers: of the step.
        cached: an array of the cache's dtype.
        scratch: from ``at`` on, 4 · longest context rounded up to blocks.
    """
    num_kv_heads, head_dim = frame[col.NUM_KV_HEADS], frame[col.HEAD_DIM]
    shape = (num_kv_heads, head_dim, frame[col.BLOCK_SIZE])
    width, out_width = op[col.SIZE], op[col.OUT_SIZE]
    group = out_width // head_dim // num_kv_heads
    x, out = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    layer = op[col.LAYER] * frame[col.LAYER_BYTES]
    keys, values = array_at(frame[col.KEYS] + layer, cached), array_at(frame[col.VALUES] + layer, cached)
    query_start = ints_at(frame[col.QUERY_START])
    tile = ints_at(frame[col.TILES] + 12 * (unit // num_kv_heads))
    head = unit % num_kv_heads
    sequence, first = np.int64(tile[0]), np.int64(tile[1])
    query_len = query_start[sequence + 1] - query_start[sequence]
    row = query_start[sequence] + first
    end = ints_at(frame[col.CONTEXT_LEN])[sequence] - query_len + first + 1
    table = (ints_at(frame[col.BLOCK_TABLES]), sequence * frame[col.MAX_BLOCKS])
    total = tile[2] * group
    for start in range(0, total, 4):
        # The queries of the group's heads, row by row; past the end, the last one again.
        i1, i2, i3 = min(start + 1, total - 1), min(start + 2, total - 1), min(start + 3, total - 1)
        t0, t1, t2, t3 = start // group, i1 // group, i2 // group, i3 // group
        q0 = (head * group + start - t0 * group) * head_dim
        q1 = (head * group + i1 - t1 * group) * head_dim
        q2 = (head * group + i2 - t2 * group) * head_dim
        q3 = (head * group + i3 - t3 * group) * head_dim
        queries = (
            (row + t0) * width + q0,
            (row + t1) * width + q1,
            (row + t2) * width + q2,
            (row + t3) * width + q3,
        )
        ends = end + t0, end + t1, end + t2, end + t3
        o0, o1 = (row + t0) * out_width + q0, (row + t1) * out_width + q1
        o2, o3 = (row + t2) * out_width + q2, (row + t3) * out_width + q3
        n0, n1, n2, n3 = attend_rows(
            x,
            queries,
            ends,
            op[col.WINDOW],
            table,
            head,
            keys,
            values,
            shape,
            numbers,
            scratch,
            at,
            out,
            (o0, o1, o2, o3),
        )
        scale_row(out, o0, head_dim, n0)
        if i1 > start:
            scale_row(out, o1, head_dim, n1)
        if i2 > i1:
            scale_row(out, o2, head_dim, n2)
        if i3 > i2:
            scale_row(out, o3, head_dim, n3)
