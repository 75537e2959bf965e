"""One token for each row of logits, each row by its own parameters and number; rows share nothing."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from manyhats.engine.backends.cpu.choosing.selection import (
    BLOCK,
    keep_over,
    keep_shortest,
    kth_largest,
    total_weight,
)
from manyhats.engine.backends.cpu.compile import inner, kernel
from manyhats.engine.backends.cpu.simd import (
    div,
    exp,
    load,
    max_lanes,
    maximum,
    splat,
    store,
    sub,
)

MINUS_INFINITY = np.float32(-np.inf)
LOWEST = np.float32(-1e30)


@inner
def copy_row(logits, x):
    """X = logits, and −∞ beyond."""
    for i in range(logits.size):
        x[i] = logits[i]
    for i in range(logits.size, x.size):
        x[i] = MINUS_INFINITY


@inner
def largest_of(x):
    """The largest of x, whose size is a multiple of 8."""
    lanes = splat(MINUS_INFINITY)
    for i in range(0, x.size, 8):
        lanes = maximum(load(x, i), lanes)
    return max_lanes(lanes)


@inner
def first_of(x, value):
    """The first place that holds a value."""
    for i in range(x.size):
        if x[i] == value:
            return i
    return -1


@inner
def weigh(x, largest, temperature, weights):
    """X = (x − largest) / temperature; weights = eˣ."""
    shift, divisor = splat(largest), splat(temperature)
    for i in range(0, x.size, 8):
        scaled = div(sub(load(x, i), shift), divisor)
        store(x, i, scaled)
        store(weights, i, exp(scaled))


@inner
def score_surprise(x, weights, scores, n):
    """Scores = −|−log p − H|, H the entropy; −∞ where p is 0 (Meister et al. 2022, arXiv:2202.00666, equation 9).

    Returns:
        The best score.
    """
    total = total_weight(weights, n)
    log_total = math.log(total)
    entropy = log_total - weighted_sum(x, weights, n) / total
    for i in range(n):
        score = np.float32(-abs(log_total - x[i] - entropy))
        scores[i] = score if weights[i] > 0.0 else MINUS_INFINITY
    for i in range(n, (n + 7) // 8 * 8):
        scores[i] = MINUS_INFINITY
    return largest_of(scores[: (n + 7) // 8 * 8])


@inner
def weighted_sum(x, weights, n):
    """Σ weights · x over x[:n], in four chains; a weight of 0 counts nothing, even of −∞."""
    s0 = s1 = s2 = s3 = 0.0
    for i in range(0, n, 4):  # up to the next multiple of 8 the weights are 0
        s0 += np.float64(weights[i]) * max(x[i], LOWEST)
        s1 += np.float64(weights[i + 1]) * max(x[i + 1], LOWEST)
        s2 += np.float64(weights[i + 2]) * max(x[i + 2], LOWEST)
        s3 += np.float64(weights[i + 3]) * max(x[i + 3], LOWEST)
    return (s0 + s1) + (s2 + s3)


@inner
def filter_row(top_k, top_p, min_p, typical_p, ids, x, weights, scores, size, buckets, picks):
    """Keeps what passes top_k, top_p, min_p and typical_p, one after another, ascending by id.

    Each sees the distribution that the ones before have left, renormalized.

    Args:
        top_k: 0 for all; equals of the k-th stay. top_p, min_p, typical_p: see ``SamplingParams``.
        ids: [V up to a multiple of 64] int32; not set where everything passes.
        x: the same as float32: (logits − largest) / temperature, −∞ beyond V.
        weights: eˣ.
        scores: scratch like x.
        size: V.
        buckets, picks: scratch, see ``boundary``.

    Returns:
        How many pass, at least one, and whether it is everything.
    """
    n, is_whole = size, True
    if 0 < top_k < n:
        limit = kth_largest(x, n, top_k, scores, buckets, picks)
        n, is_whole = keep_over(x, limit, ids, x, weights, x, n, is_whole), False
    if top_p < 1.0:
        n = keep_shortest(top_p, np.float32(0.0), ids, x, weights, x, n, is_whole, buckets, picks)
        is_whole = False
    if min_p > 0.0:
        n, is_whole = keep_over(weights, np.float32(min_p), ids, x, weights, x, n, is_whole), False
    if typical_p < 1.0:
        best = score_surprise(x, weights, scores, n)
        n = keep_shortest(typical_p, best, ids, x, weights, scores, n, is_whole, buckets, picks)
        is_whole = False
    return n, is_whole


@inner
def draw(weights, n, point):
    """The first place whose cumulative weight is over ``point`` of the total; never one of weight 0."""
    target = point * total_weight(weights, n)
    held = 0.0
    first = 0
    while first + BLOCK < n:
        block = total_weight(weights[first:], BLOCK)
        if held + block > target:
            break
        held += block
        first += BLOCK
    chosen = -1
    for i in range(first, min(first + BLOCK, n)):
        if weights[i] > 0.0:
            chosen = i
            held += weights[i]
            if held > target:
                break
    while chosen < 0:  # rounding went past the last one that has a weight
        first -= 1
        if weights[first] > 0.0:
            chosen = first
    return chosen


@inner
def edit_row(x, ids, values, start, end):
    """x[ids[e]] = values[e] for the edits of a row, in order."""
    for edit in range(start, end):
        x[ids[edit]] = values[edit]


@inner
def mask_row(x, mask):
    """X = −∞ where the mask is false."""
    for i in range(mask.size):
        x[i] = x[i] if mask[i] else MINUS_INFINITY


@kernel
def choose(
    logits, temperature, top_k, top_p, min_p, typical_p, point, edit_start, edit_ids, edit_values, mask_rows, masks,
    ids, x, weights, scores, picks, buckets, tokens, num_threads,
):  # fmt: skip
    """One token for each row; see ``Choices``, which names the arguments from ``temperature`` to ``masks``.

    Args:
        logits: [M, V] float32.
        ids: [threads, V up to a multiple of 64] int32 scratch; picks: the same.
        x: the same as float32; weights, scores: the same.
        buckets: [threads, NUM_BUCKETS] float64 scratch.
        tokens: [M] int64, written; −1 where no token is allowed.
    """
    num_rows, size = logits.shape
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            own = x[thread]
            copy_row(logits[row], own)
            edit_row(own, edit_ids, edit_values, edit_start[row], edit_start[row + 1])
            if mask_rows[row] >= 0:
                mask_row(own, masks[mask_rows[row]])
            largest = largest_of(own)
            if largest == MINUS_INFINITY:
                tokens[row] = -1
            elif temperature[row] == 0.0:
                tokens[row] = first_of(own, largest)
            else:
                weigh(own, largest, temperature[row], weights[thread])
                n, is_whole = filter_row(
                    top_k[row], top_p[row], min_p[row], typical_p[row],
                    ids[thread], own, weights[thread], scores[thread], size, buckets[thread], picks[thread],
                )  # fmt: skip
                place = draw(weights[thread], n, point[row])
                tokens[row] = place if is_whole else ids[thread, place]
