"""The best of one row of numbers: those over a limit, and the shortest run that holds a given weight.

A row's numbers lie in a few arrays side by side, of which the first n count: ids, scaled logits, weights, and
scores. Scores are at most 0 and the larger go first, equal ones by id. No order of sums depends on anything but
the row itself.
"""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.simd import add, at_least, load, max_lanes, maximum, splat, sum_lanes, zero

GROUP = 64
"""Rows are padded to a multiple of it."""
NUM_BUCKETS = 2048
BLOCK = 256
NARROW = np.float32(4.0)
WIDE = np.float32(8.0)
"""In nats from the best score: what is kept mostly lies within little, so little is looked at closely."""


@inner
def total_weight(weights, n):
    """Σ weights[:n]; up to the next multiple of 8 they are 0."""
    total = 0.0
    for start in range(0, n, BLOCK):
        lanes = zero()
        for i in range(start, min(start + BLOCK, n), 8):
            lanes = add(lanes, load(weights, i))
        total += sum_lanes(lanes)
    return total


@inner
def weight_over(scores, weights, n, limit):
    """Σ weights[i] over scores[i] ≥ limit."""
    total = 0.0
    limits = splat(limit)
    for start in range(0, n, BLOCK):
        lanes = zero()
        for i in range(start, min(start + BLOCK, n), 8):
            lanes = add(lanes, at_least(load(scores, i), limits, load(weights, i)))
        total += sum_lanes(lanes)
    return total


@inner
def move(ids, x, weights, scores, source, target, is_whole):
    """Takes entry ``source`` to place ``target``, not after it; in a whole row an entry's place is its id.

    Callers move every entry they look at and count those they keep, since a branch would often be mispredicted.
    """
    ids[target] = source if is_whole else ids[source]
    x[target] = x[source]
    weights[target] = weights[source]
    scores[target] = scores[source]


@inner
def end_with_zeros(weights, n):
    """Makes the weights up to the next multiple of 8 zero."""
    for i in range(n, min((n + 7) // 8 * 8, weights.size)):
        weights[i] = 0.0


@inner
def keep_over(values, limit, ids, x, weights, scores, n, is_whole):
    """Keeps the entries with values[i] ≥ limit, in order; ``values`` is one of the arrays. Returns their number."""
    kept = 0
    for start in range(0, n, 8):
        if max_lanes(load(values, start)) >= limit:
            for i in range(start, min(start + 8, n)):
                is_kept = values[i] >= limit
                move(ids, x, weights, scores, i, kept, is_whole)
                kept += is_kept
    end_with_zeros(weights, kept)
    return kept


@inner
def order_key(bits):
    """Grows as a score that is not positive falls: its bits without the sign."""
    return bits & np.uint32(0x7FFFFFFF)


@inner
def bucket_of(key, level):
    """The key's bits 20 to 30, 10 to 19, 0 to 9."""
    if level == 0:
        return np.intp(key >> np.uint32(20))
    return np.intp((key >> np.uint32(20 - 10 * level)) & np.uint32(1023))


@inner
def boundary(bits, weights, n, needed, counts_only, buckets, picks):
    """Where the shortest run that holds ``needed`` ends: its last entry's key and place.

    The weights are sorted into buckets by the key's leading bits, then those of the bucket in which the run ends
    by the next bits; entries with one key go by place.

    Args:
        bits: of the scores, as uint32.
        weights: at least 0.
        n: entries that count; at least one weight is positive.
        needed: weight; where rounding makes it more than there is, the run ends with the last positive weight.
        counts_only: each entry weighs 1.
        buckets: [NUM_BUCKETS] float64 scratch.
        picks: [n] int32 scratch.
    """
    held = 0.0
    num_picks = n
    for level in range(3):
        buckets[:] = 0.0
        for j in range(num_picks):
            i = j if level == 0 else np.intp(picks[j])
            buckets[bucket_of(order_key(bits[i]), level)] += 1.0 if counts_only else weights[i]
        last = -1
        before_last = held
        for bucket in range(NUM_BUCKETS):
            if buckets[bucket] > 0.0:
                last = bucket
                before_last = held
                held += buckets[bucket]
                if held >= needed:
                    break
        held = before_last
        count = 0
        for j in range(num_picks):
            i = j if level == 0 else np.intp(picks[j])
            picks[count] = i
            count += bucket_of(order_key(bits[i]), level) == last
        num_picks = count
    place = np.intp(picks[0])
    for j in range(num_picks):
        i = np.intp(picks[j])
        weight = 1.0 if counts_only else np.float64(weights[i])
        if weight > 0.0:
            place = i
            held += weight
            if held >= needed:
                break
    return order_key(bits[place]), place


@inner
def keep_shortest(mass, best, ids, x, weights, scores, n, is_whole, buckets, picks):
    """Keeps the shortest run, the ``best`` score first, that holds at least ``mass`` of all weight; its size."""
    needed = mass * total_weight(weights, n)
    if weight_over(scores, weights, n, best - NARROW) >= needed:
        n = keep_over(scores, best - NARROW, ids, x, weights, scores, n, is_whole)
        is_whole = False
    elif weight_over(scores, weights, n, best - WIDE) >= needed:
        n = keep_over(scores, best - WIDE, ids, x, weights, scores, n, is_whole)
        is_whole = False
    bits = scores.view(np.uint32)
    cut, place = boundary(bits, weights, n, needed, False, buckets, picks)
    kept = 0
    for i in range(n):
        key = order_key(bits[i])
        is_kept = (key < cut) | ((key == cut) & (i <= place))
        move(ids, x, weights, scores, i, kept, is_whole)
        kept += is_kept
    end_with_zeros(weights, kept)
    return kept


@inner
def kth_largest(x, n, k, candidates, buckets, picks):
    """The k-th largest of x[:n], none positive; up to the next multiple of ``GROUP`` x is −∞.

    The k-th largest of the groups' maxima is no more than it, so that most of the row need not be looked at.
    """
    num_groups = (n + GROUP - 1) // GROUP
    if k >= num_groups:
        _, place = boundary(x.view(np.uint32), x, n, float(k), True, buckets, picks)
        return x[place]
    for group in range(num_groups):
        lanes = load(x, group * GROUP)
        for i in range(group * GROUP + 8, (group + 1) * GROUP, 8):
            lanes = maximum(load(x, i), lanes)
        candidates[group] = max_lanes(lanes)
    bits = candidates.view(np.uint32)
    _, place = boundary(bits, candidates, num_groups, float(k), True, buckets, picks)
    limit = candidates[place]
    count = 0
    for start in range(0, n, 8):
        if max_lanes(load(x, start)) >= limit:
            for i in range(start, min(start + 8, n)):
                candidates[count] = x[i]
                count += x[i] >= limit
    _, place = boundary(bits, candidates, count, float(k), True, buckets, picks)
    return candidates[place]
