"""Mixtures of experts: which row goes to which, and the linears of all experts of a layer as one instruction.

A row and one of its experts are a *pair*; N rows have N · k of them, which lie in the order of experts, those of one in
the order of rows. An expert's linear is that of ``linear`` on its pairs, so a row's result depends on itself alone.

Two buffers hold integers. Of each row: its experts, in order; their weights, as float32; the places of its pairs. Of
all rows: the experts that have pairs; where each one's pairs begin, and where the next of them goes; and the row of
each pair. How many experts have pairs stands apart, and of each layer by itself: a thread that comes late to a layer's
linears must still count the shares that the others have counted, though these are at the next layer.
"""

from __future__ import annotations

import math

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.linear import linear
from manyhats.engine.backends.cpu.simd import fma, load, splat, store, zero


def words_of_routes(num_per_row: int) -> int:
    """32-bit words of a row in the buffer of rows' experts."""
    return 3 * num_per_row


def words_of_pairs(num_experts: int, num_per_row: int) -> int:
    """32-bit words of the buffer of pairs, for each row of a step; enough for a step of one."""
    return 3 * num_experts + 1 + num_per_row


@inner
def pairs_of(op, buffers):
    """The buffer of pairs, and where in it the experts with pairs, their beginnings, and the pairs' rows begin."""
    num_experts = op[col.NUM_EXPERTS]
    return ints_at(buffers[op[col.PAIRS]]), 0, num_experts, 3 * num_experts + 1


@inner
def route(op, first, last, buffers):
    """The experts of rows first … last, in order, and their weights."""
    num_experts, count = op[col.NUM_EXPERTS], op[col.NUM_PER_ROW]
    logits = floats_at(buffers[op[col.SOURCE]])
    chosen, shares = ints_at(buffers[op[col.TARGET]]), floats_at(buffers[op[col.TARGET]])
    for row in range(first, last):
        start, at = row * op[col.SIZE], row * 3 * count
        choose(logits, start, num_experts, chosen, at, count)
        weigh(logits, start, num_experts, chosen, shares, at, count, op[col.RENORMALIZES])


@inner
def choose(logits, start, num_experts, chosen, at, count):
    """chosen[at : at + count] = the places of the largest logits, in order; of equal ones the first.

    NaN is taken like any other, so that there are always as many.
    """
    for found in range(count):
        best, passed = -1, 0
        for expert in range(num_experts):
            if passed < found and chosen[at + passed] == expert:
                passed += 1
            elif best < 0 or logits[start + expert] > logits[start + best]:
                best = expert
        place = at + found
        while place > at and chosen[place - 1] > best:
            chosen[place] = chosen[place - 1]
            place -= 1
        chosen[place] = best


@inner
def weigh(logits, start, num_experts, chosen, shares, at, count, renormalizes):
    """The softmax of the logits of chosen experts, among these or among all, behind them."""
    largest, total = logits[start + chosen[at]], 0.0
    for place in range(count):
        largest = max(largest, logits[start + chosen[at + place]])
    for place in range(count if renormalizes else num_experts):
        expert = chosen[at + place] if renormalizes else place
        total += math.exp(logits[start + expert] - largest)
    for place in range(count):
        power = math.exp(logits[start + chosen[at + place]] - largest)
        shares[at + count + place] = np.float32(power / total)


@inner
def pair(op, num_rows, buffers):
    """Sorts the pairs of all rows by expert."""
    count = op[col.NUM_PER_ROW]
    routes = ints_at(buffers[op[col.SOURCE]])
    pairs, used, begins, rows = pairs_of(op, buffers)
    ends = begins + op[col.NUM_EXPERTS]
    for expert in range(op[col.NUM_EXPERTS] + 1):
        pairs[begins + expert] = 0
    for row in range(num_rows):
        for place in range(count):
            pairs[begins + 1 + routes[row * 3 * count + place]] += 1
    num_used = 0
    for expert in range(op[col.NUM_EXPERTS]):
        if pairs[begins + 1 + expert] > 0:
            pairs[used + num_used] = expert
            num_used += 1
        pairs[begins + 1 + expert] += pairs[begins + expert]
        pairs[ends + 1 + expert] = pairs[begins + expert]
    longs_at(op[col.NUM_USED])[0] = num_used
    for row in range(num_rows):
        for place in range(row * 3 * count, row * 3 * count + count):
            target = ends + 1 + routes[place]
            routes[place + 2 * count] = pairs[target]
            pairs[rows + pairs[target]] = row
            pairs[target] += 1


@inner
def spread(op, first, last, buffers):
    """Copies to pairs first … last the 32-bit words of their rows."""
    size = op[col.SIZE]
    source, target = ints_at(buffers[op[col.SOURCE]]), ints_at(buffers[op[col.TARGET]])
    pairs, _, _, rows = pairs_of(op, buffers)
    for place in range(first, last):
        at = np.int64(pairs[rows + place]) * size
        for i in range(size):
            target[place * size + i] = source[at + i]


@inner
def panels_of_expert_share(op, num_used, num_shares):
    """Panels of an expert's weights per share, for about so many shares of all experts that have pairs."""
    num_panels = (op[col.NUM_OUT] + op[col.PANEL_ROWS] - 1) // op[col.PANEL_ROWS]
    return min(max(1, num_panels * num_used // num_shares), num_panels)


@inner
def num_expert_shares(op, num_shares):
    """A share is some panels of one expert's weights."""
    num_used = longs_at(op[col.NUM_USED])[0]
    size = panels_of_expert_share(op, num_used, num_shares) * op[col.PANEL_ROWS]
    return num_used * ((op[col.NUM_OUT] + size - 1) // size)


@inner
def expert_linear(op, share, num_shares, buffers, scratch, at):
    """A share of the linears of all experts, each on its own pairs.

    Args:
        op: its weights are a table of the experts' instructions.
        share: index of panels among those of the experts that have pairs.
        num_shares: as for ``num_expert_shares``.
        buffers: of the step.
        scratch: from ``at`` on, for decoded weights.
    """
    pairs, used, begins, _ = pairs_of(op, buffers)
    num_out = op[col.NUM_OUT]
    size = panels_of_expert_share(op, longs_at(op[col.NUM_USED])[0], num_shares) * op[col.PANEL_ROWS]
    per_expert = (num_out + size - 1) // size
    expert = np.int64(pairs[used + share // per_expert])
    first = share % per_expert * size
    begin, end = np.int64(pairs[begins + expert]), np.int64(pairs[begins + expert + 1])
    own = longs_at(op[col.WEIGHTS] + 8 * col.NUM_COLUMNS * expert)
    x = buffers[op[col.SOURCE]] + 4 * begin * op[col.ROW_WORDS]
    y = buffers[op[col.TARGET]] + 4 * begin * num_out
    linear(own, x, y, end - begin, first, min(first + size, num_out), scratch, at)


@inner
def combine(op, first, last, buffers):
    """Rows first … last as the sum of what their experts made of them, times the weights, in the experts' order."""
    size, count = op[col.SIZE], op[col.NUM_PER_ROW]
    x, y = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    routes, shares = ints_at(buffers[op[col.ROUTES]]), floats_at(buffers[op[col.ROUTES]])
    for row in range(first, last):
        at = row * 3 * count
        for i in range(0, size, 8):
            total = zero()
            for place in range(at, at + count):
                source = np.int64(routes[place + 2 * count]) * size
                total = fma(load(x, source + i), splat(shares[place + count]), total)
            store(y, row * size + i, total)
