"""Exact logits of the tokens that matter, where the others come from 8-bit weights.

A row's likeliest tokens, and any that are named, get the logits that the head's own weights give, by the arithmetic of
``linear``: bit for bit what it would have written.
"""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import floats_at, halves_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.linear import tile_1x3
from manyhats.engine.backends.cpu.simd import (
    add,
    at_least,
    load,
    max_lanes,
    maximum,
    splat,
    store,
    sum_lanes,
    zero,
)

NUM_CANDIDATES = 64
"""Of a row's tokens, the least number whose logits become exact."""
NUM_PLACES = 128
"""Among which a row's tokens are dealt out in turn, as neighbours in a vocabulary tend to be alike."""


@inner
def clear_places(places, at):
    """Makes the largest logit at each place that of no token."""
    for i in range(at, at + NUM_PLACES):
        places[i] = -np.inf


@inner
def limit_of(places, at):
    """What 64 of the largest logits at each place reach, and few logits beside them do; -∞ where there are fewer."""
    limit = np.float32(-np.inf)
    one = splat(np.float32(1.0))
    for i in range(at, at + NUM_PLACES):
        value = splat(places[i])
        count = zero()
        for j in range(at, at + NUM_PLACES, 8):
            count = add(count, at_least(load(places, j), value, one))
        if sum_lanes(count) >= NUM_CANDIDATES:
            limit = max(limit, places[i])
    return limit


@inner
def exact_three(op, x, x_at, tokens, y, y_at):
    """y[y_at + token] = the logit of each of three tokens of a row, which may be the same."""
    k = op[col.SIZE]
    bias = floats_at(op[col.BIAS])
    first, second, third = tokens
    w0, w1, w2 = first * k, second * k, third * k
    place, o1, o2 = y_at + first, second - first, third - first
    b0, b1, b2 = bias[first], bias[second], bias[third]
    if op[col.KIND] == col.BFLOAT16:
        tile_1x3(x, x_at, halves_at(op[col.WEIGHTS]), w0, w1, w2, k, y, place, o1, o2, b0, b1, b2, 0, 0)
    else:
        tile_1x3(x, x_at, floats_at(op[col.WEIGHTS]), w0, w1, w2, k, y, place, o1, o2, b0, b1, b2, 0, 0)


@inner
def refine(op, first, last, buffers, scratch, place):
    """Makes the logits of each row's likeliest tokens exact, at least 64 of them.

    Args:
        op: the head's own weights; source are its inputs [M, k], target logits [M, V] that are nearly right.
        first, last: rows.
        buffers: of the step.
        scratch: from ``place`` on, 128 values.
    """
    x, y = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    k, size = op[col.SIZE], op[col.NUM_OUT]
    for row in range(first, last):
        at = row * size
        clear_places(scratch, place)
        for start in range(0, size, NUM_PLACES):
            for i in range(0, min(NUM_PLACES, size - start), 8):
                largest = maximum(load(y, at + start + i), load(scratch, place + i))
                store(scratch, place + i, largest)
        limit = limit_of(scratch, place)
        held = 0
        c0 = c1 = 0
        for start in range(at, at + size, 16):
            if max_lanes(maximum(load(y, start), load(y, start + 8))) >= limit:
                for i in range(start, start + 16):
                    if y[i] >= limit:
                        token = i - at
                        if held == 2:
                            exact_three(op, x, row * k, (c0, c1, token), y, at)
                            held = 0
                        else:
                            c0, c1 = (c0, token) if held else (token, token)
                            held += 1
        if held:
            exact_three(op, x, row * k, (c0, c1, c1), y, at)


@inner
def refine_allowed(op, first, last, buffers, scratch, at):
    """The same for some rows, among the tokens that may come.

    Args:
        op: as for ``refine``; the buffer ``WHICH`` holds, for each of these rows, its number in target, then a mask,
            bit by bit from the lowest: [R, 1 + ⌈V / 32⌉] int32.
        first, last: of these rows.
        buffers: of the call.
        scratch: from ``at`` on, 128 values.
    """
    x, y, masks = (
        floats_at(buffers[op[col.SOURCE]]),
        floats_at(buffers[op[col.TARGET]]),
        ints_at(buffers[op[col.WHICH]]),
    )
    k, size = op[col.SIZE], op[col.NUM_OUT]
    num_words = (size + 31) // 32
    for index in range(first, last):
        mask = index * (1 + num_words) + 1
        row = np.int64(masks[mask - 1])
        y_at = row * size
        clear_places(scratch, at)
        for token in range(size):
            if masks[mask + token // 32] >> (token % 32) & 1:
                place = at + token % NUM_PLACES
                scratch[place] = max(scratch[place], y[y_at + token])
        limit = limit_of(scratch, at)
        for token in range(size):
            if masks[mask + token // 32] >> (token % 32) & 1 and y[y_at + token] >= limit:
                exact_three(op, x, row * k, (token, token, token), y, y_at)


@inner
def exact_logits(op, first, last, buffers):
    """The exact logits of given tokens.

    Args:
        op: the head's own weights; source are its inputs [M, k], the buffer ``WHICH`` holds pairs of row and token,
            [P, 2] int64, and target is [P].
        first, last: pairs.
        buffers: of the call.
    """
    x, y = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    pairs = longs_at(buffers[op[col.WHICH]])
    for pair in range(first, last):
        token = pairs[2 * pair + 1]
        exact_three(op, x, pairs[2 * pair] * op[col.SIZE], (token, token, token), y, pair - token)
