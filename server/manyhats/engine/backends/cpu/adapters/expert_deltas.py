"""Adapters' low-rank deltas on experts, each row's by its own."""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.low_rank import expand, shrink
from manyhats.engine.backends.cpu.addresses import bytes_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner

MEMBERS = ("gate_proj", "up_proj", "down_proj")
"""An expert's linears; its entries follow one another."""
# Columns of an entry, int64: addresses of the matrices, the rank, 0 for none, the scale, a float32 in its first half.
A_ADDRESS, B_ADDRESS, RANK, SCALE = range(4)
NUM_COLUMNS = 4


@inner
def num_expert_delta_shares(op, frame):
    """A share is a row with an adapter, at one of its experts."""
    num_rows = frame[col.NUM_ADAPTER_ROWS]
    if num_rows == 0 or not bytes_at(frame[col.HAS_EXPERT_ENTRIES])[op[col.LAYER]]:
        return 0
    return num_rows * op[col.NUM_PER_ROW]


@inner
def expert_deltas(op, share, frame, buffers, like, scratch, at):
    """y += scale · (x Aᵀ) B, for one pair of a row and an expert, at those linears that are side by side in y.

    Args:
        op: source holds x, of rows or of pairs, target y, of pairs.
        share: index among the rows with an adapter · k + that among the row's experts.
        frame, buffers: of the step.
        like: an array of the adapters' dtype.
        scratch: from ``at`` on, as many values as the largest rank.
    """
    count = op[col.NUM_PER_ROW]
    index = share // count
    row = np.int64(ints_at(frame[col.ADAPTER_ROWS])[index])
    slot = ints_at(frame[col.ADAPTER_SLOTS])[index]
    entries = longs_at(frame[col.EXPERT_ENTRIES])[op[col.LAYER] * frame[col.NUM_SLOTS] + slot]
    if entries == 0:
        return
    routes = ints_at(buffers[op[col.ROUTES]])
    route = row * 3 * count + share - index * count
    pair = np.int64(routes[route + 2 * count])
    entry = entries + 8 * NUM_COLUMNS * (len(MEMBERS) * np.int64(routes[route]) + op[col.FIRST_MEMBER])
    x, y = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    source = (pair if op[col.IS_OF_PAIRS] else row) * op[col.SIZE]
    size = op[col.NUM_OUT] // op[col.NUM_MEMBERS]
    for member in range(op[col.NUM_MEMBERS]):
        own = longs_at(entry)
        rank = own[RANK]
        if rank > 0:
            shrink(x, source, op[col.SIZE], own[A_ADDRESS], rank, like, scratch, at)
            scale = floats_at(entry + 8 * SCALE)[0]
            expand(
                scratch,
                at,
                rank,
                own[B_ADDRESS],
                size,
                like,
                scale,
                y,
                pair * op[col.NUM_OUT] + member * size,
            )
        entry += 8 * NUM_COLUMNS
