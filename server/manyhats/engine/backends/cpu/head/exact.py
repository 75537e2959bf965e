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
def exact_three(op, x, x_at, tokens, y, places):
    """y[places] = the logits of three tokens of a row, which may be the same."""
    k = op[col.SIZE]
    bias = floats_at(op[col.BIAS])
    first, second, third = tokens
    w0, w1, w2 = first * k, second * k, third * k
    place, o1, o2 = places[0], places[1] - places[0], places[2] - places[0]
    b0, b1, b2 = bias[first], bias[second], bias[third]
    if op[col.KIND] == col.BFLOAT16:
        tile_1x3(x, x_at, halves_at(op[col.WEIGHTS]), w0, w1, w2, k, y, place, o1, o2, b0, b1, b2, 0, 0)
    else:
        tile_1x3(x, x_at, floats_at(op[col.WEIGHTS]), w0, w1, w2, k, y, place, o1, o2, b0, b1, b2, 0, 0)


@inner
def exact_if_over(op, x, x_at, y, y_at, token, limit, held):
    """Makes a token's logit exact, if it reaches the limit, together with the two before it.

    Args:
        op, x, x_at: as for ``exact_three``.
        y: from ``y_at`` on, the row's logits.
        token: of the row.
        limit: what its logit reaches, or not.
        held: how many tokens wait for others to join them, and which.

    Returns:
        The same afterwards.
    """
    count, first, second = held
    if y[y_at + token] >= limit:
        if count == 2:
            places = y_at + first, y_at + second, y_at + token
            exact_three(op, x, x_at, (first, second, token), y, places)
            return 0, first, second
        return count + 1, (first if count else token), token
    return held


@inner
def exact_rest(op, x, x_at, y, y_at, held):
    """Makes the logits exact of the tokens that still wait."""
    count, first, second = held
    if count:
        exact_three(op, x, x_at, (first, second, second), y, (y_at + first, y_at + second, y_at + second))


@inner
def raise_places(y, at, count, places, places_at):
    """Makes ``count`` places the larger of what they are and of as many logits."""
    for i in range(0, count, 8):
        store(places, places_at + i, maximum(load(y, at + i), load(places, places_at + i)))


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
            raise_places(y, at + start, min(NUM_PLACES, size - start), scratch, place)
        limit = limit_of(scratch, place)
        held = 0, 0, 0
        for start in range(0, size, 16):
            if max_lanes(maximum(load(y, at + start), load(y, at + start + 8))) >= limit:
                for token in range(start, start + 16):
                    held = exact_if_over(op, x, row * k, y, at, token, limit, held)
        exact_rest(op, x, row * k, y, at, held)


@inner
def largest_of_word(y, at):
    """The largest of 32 logits."""
    first = maximum(load(y, at), load(y, at + 8))
    return max_lanes(maximum(first, maximum(load(y, at + 16), load(y, at + 24))))


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
        for word in range(num_words):
            bits, start = masks[mask + word], 32 * word
            if bits == -1 and start + 32 <= size:
                raise_places(y, y_at + start, 32, scratch, at + start % NUM_PLACES)
            elif bits != 0:
                for token in range(start, min(start + 32, size)):
                    if bits >> (token - start) & 1:
                        place = at + token % NUM_PLACES
                        scratch[place] = max(scratch[place], y[y_at + token])
        limit = limit_of(scratch, at)
        held = 0, 0, 0
        for word in range(num_words):
            bits, start = masks[mask + word], 32 * word
            if bits != 0 and (start + 32 > size or largest_of_word(y, y_at + start) >= limit):
                for token in range(start, min(start + 32, size)):
                    if bits >> (token - start) & 1:
                        held = exact_if_over(op, x, row * k, y, y_at, token, limit, held)
        exact_rest(op, x, row * k, y, y_at, held)


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
    p0 = first
    while p0 < last:
        row = pairs[2 * p0]
        p1 = min(p0 + 1, last - 1)
        p1 = p1 if pairs[2 * p1] == row else p0
        p2 = min(p1 + 1, last - 1)
        p2 = p2 if pairs[2 * p2] == row else p1
        tokens = pairs[2 * p0 + 1], pairs[2 * p1 + 1], pairs[2 * p2 + 1]
        exact_three(op, x, row * op[col.SIZE], tokens, y, (p0, p1, p2))
        p0 = p2 + 1
