"""Log-probabilities, ranks and the most likely tokens of rows of logits; rows share nothing."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from manyhats.engine.backends.cpu.choosing.selection import BLOCK
from manyhats.engine.backends.cpu.compile import inner, kernel
from manyhats.engine.backends.cpu.simd import add, exp, load, max_lanes, maximum, splat, sub, sum_lanes, zero


@inner
def largest_value(row):
    """The largest of a row of any size."""
    whole = row.size // 8 * 8
    largest = np.float32(-np.inf)
    if whole > 0:
        lanes = load(row, 0)
        for i in range(8, whole, 8):
            lanes = maximum(load(row, i), lanes)
        largest = max_lanes(lanes)
    for i in range(whole, row.size):
        largest = max(largest, row[i])
    return largest


@inner
def log_total_of(row):
    """Log Σ eˣ in float64, of exponentials in float32."""
    largest = largest_value(row)
    shift = splat(largest)
    whole = row.size // 8 * 8
    total = 0.0
    for start in range(0, whole, BLOCK):
        lanes = zero()
        for i in range(start, min(start + BLOCK, whole), 8):
            lanes = add(lanes, exp(sub(load(row, i), shift)))
        total += sum_lanes(lanes)
    for i in range(whole, row.size):
        total += math.exp(row[i] - largest)
    return np.float64(largest) + math.log(total)


@inner
def num_over(row, value):
    """How many are larger."""
    count = 0
    for i in range(row.size):
        count += row[i] > value
    return count


@inner
def insert(row, place, count, ids, values):
    """Puts row[place] among the first ``count`` of ``values``, behind those that are as large; the last one may go."""
    value = np.float64(row[place])
    at = min(count, ids.size - 1)
    while at > 0 and values[at - 1] < value:
        values[at] = values[at - 1]
        ids[at] = ids[at - 1]
        at -= 1
    values[at] = value
    ids[at] = place


@inner
def find_largest(row, ids, values):
    """The largest of a row, best first, ties by id: as many as ``ids`` has room for, which the row has."""
    num_wanted = ids.size
    for i in range(num_wanted):
        insert(row, i, i, ids, values)
    first = min((num_wanted + 7) // 8 * 8, row.size)
    for i in range(num_wanted, first):
        if row[i] > values[num_wanted - 1]:
            insert(row, i, num_wanted, ids, values)
    whole = max(row.size // 8 * 8, first)
    for start in range(first, whole, 8):
        if max_lanes(load(row, start)) > values[num_wanted - 1]:
            for i in range(start, start + 8):
                if row[i] > values[num_wanted - 1]:
                    insert(row, i, num_wanted, ids, values)
    for i in range(whole, row.size):
        if row[i] > values[num_wanted - 1]:
            insert(row, i, num_wanted, ids, values)


@kernel
def score(logits, rows, targets, logprobs, ranks, top_ids, top_logprobs, log_totals, num_threads):
    """Log-probability and rank of each target, and the most likely tokens of each row.

    Args:
        logits: [M, V] float32, finite.
        rows: [P] int64, the row of each target.
        targets: [P] int64 in [0, V).
        logprobs: [P] float64, written; ranks: [P] int64, too.
        top_ids: [M, K] int64, K at most V, written; top_logprobs: [M, K] float64, too.
        log_totals: [M] float64 scratch.
    """
    num_top = top_ids.shape[1]
    for thread in prange(num_threads):
        for row in range(thread, logits.shape[0], num_threads):
            log_totals[row] = log_total_of(logits[row])
            if num_top > 0:
                find_largest(logits[row], top_ids[row], top_logprobs[row])
                for place in range(num_top):
                    top_logprobs[row, place] -= log_totals[row]
    for thread in prange(num_threads):
        for pair in range(thread, targets.size, num_threads):
            row = rows[pair]
            value = logits[row, targets[pair]]
            logprobs[pair] = np.float64(value) - log_totals[row]
            ranks[pair] = num_over(logits[row], value) + 1
