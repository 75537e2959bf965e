"""One token for each choice, by its own parameters and number; choices share nothing.

Weights are integers, ⌊2⁴² · exp((value − largest) / temperature)⌋, so that their sums are exact in any order: no tile's
size shows in a token, and a share of a total is reached or it is not. A token of less than 2⁻⁴² of the best one's
weight has none, and does not count.

No filter sorts. What it keeps are the entries whose score is over a boundary, the largest score at which the run holds
enough, and of those at the boundary the first. The boundary is found by halving the range that it lies in, whose ends
become scores of the row.

``weigh`` finds how many tokens lie within each of ``EDGES`` distances from the best, and their weight; ``gather`` lists
those of the least distance that is sure to hold all that pass the filters. Both go through the vocabulary on the whole
device. ``choose``, one program a row, then looks at the list alone, unless it would be too long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.triton.wanted import (
    INTS,
    NUM_CHOICES,
    NUMBERS,
    TOKENS,
    finite,
    float64s,
    int32s,
    word,
)

BEYOND = tl.constexpr(2**31 - 1)
NO_LIMIT = tl.constexpr(2**62)
TOP_K = tl.constexpr(0)
TOP_P = tl.constexpr(1)
TYPICAL_P = tl.constexpr(2)
EDGES = tl.constexpr(8)


@triton.jit
def edge(index):
    """The scaled value at an edge, where the best token's is 0; beyond the last nothing has a weight."""
    return (index + 1) * (index + 1) * -0.5


@triton.jit
def int64(number: tl.constexpr):
    """A constant as int64."""
    return tl.full((), number, tl.int64)


@triton.jit
def fixed(weights):
    """⌊2⁴² w⌋ as int64 for w in [0, 1], from the bits: conversions to 64-bit integers are slow."""
    bits = weights.to(tl.int32, bitcast=True)
    shift = (bits >> 23) - 108  # 127 + 23 − 42
    digits = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    up, down = tl.minimum(tl.maximum(shift, 0), 19), tl.minimum(tl.maximum(-shift, 0), 31)
    return (digits << up.to(tl.int64)) >> down.to(tl.int64)


@triton.jit
def needed_of(share, total):
    """The least weight that is a share of a total; over 0, which no run of tokens holds less than."""
    return tl.maximum(tl.minimum(tl.ceil(share * total.to(tl.float64)).to(tl.int64), total), 1)


@triton.jit
def choice_of(logits, changed, wants, largest, choice, size, max_rows, num_parts, PARTS: tl.constexpr):
    """What a choice is made of.

    Returns:
        Its row of values [V], changed where it is to be; the line of ``survey`` that this is; the largest value;
        temperature, top_k (0 for all), top_p, log min_p and typical_p.
    """
    ints = int32s(wants, wants, INTS) + choice * 8
    row, top_k = tl.load(ints).to(tl.int64), tl.load(ints + 1)
    values = logits + row * size
    line = row
    if tl.load(ints + 5) != 0:
        values = changed + choice * size
        line = choice + max_rows
    part = tl.arange(0, PARTS)
    tops = tl.load(largest + line * num_parts + part, mask=part < num_parts, other=float("-inf"))
    numbers = float64s(wants, wants, NUMBERS) + choice * 8
    temperature, log_min_p = tl.load(numbers).to(tl.float32), tl.load(numbers + 2).to(tl.float32)
    top_k = tl.where(top_k < size, top_k, 0)
    return (
        values,
        line,
        tl.max(tops, 0),
        temperature,
        top_k,
        tl.load(numbers + 1),
        log_min_p,
        tl.load(numbers + 3),
    )


@triton.jit
def entries(values, start, size, largest, temperature, TILE: tl.constexpr):
    """A tile of a row: places, values (−∞ for what may not come), scaled values, and weights."""
    at = start + tl.arange(0, TILE)
    value = tl.load(values + at, mask=at < size, other=float("-inf"))
    value = tl.where(value == float("-inf"), value, finite(value))
    x = (value - largest) / temperature
    return at, value, x, fixed(tl.exp(x))


@triton.jit
def scored(x, value, weight, mean, stage):
    """Scores of a filter, larger for what is kept first; −∞ for what has no weight.

    That of ``typical_p`` is −|−log p − H|, H the entropy (Meister et al. 2022, arXiv:2202.00666, equation 9), which is
    −|x − Σ p x|.
    """
    score = value
    if stage == TYPICAL_P:
        score = -tl.abs(x - mean)
    return tl.where(weight > 0, score, float("-inf"))


@triton.jit(do_not_specialize=["max_rows"])
def weigh(
    logits,
    changed,
    wants,
    largest,
    counts,
    masses,
    size,
    max_rows,
    num_parts,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """How many entries of each part of a row lie within each edge, and their weight.

    Args:
        logits: [max_rows, V] float32; changed: [max_choices, V], too.
        wants: see ``wanted``.
        largest: what ``survey`` found.
        counts: [max_choices, EDGES, parts] int32, written; masses: the same as int64.
        size: V.
        max_rows: rows that the buffers have room for.
        num_parts: at most PARTS.

    Grid: (max_choices, ⌈V / PART⌉).
    """
    choice, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if choice >= word(wants, NUM_CHOICES):
        return
    values, _, top, temperature, _, _, _, _ = choice_of(
        logits, changed, wants, largest, choice, size, max_rows, num_parts, PARTS
    )
    if (temperature == 0) | (top == float("-inf")):
        return
    _, _, x, weight = entries(values, part * PART, size, top, temperature, PART)
    place = choice * EDGES * num_parts + part
    for index in range(EDGES):
        is_within = (x >= edge(index)) & (weight > 0)
        tl.store(counts + place, tl.sum(is_within.to(tl.int32), 0))
        tl.store(masses + place, tl.sum(tl.where(is_within, weight, 0), 0))
        place += num_parts


@triton.jit
def list_of(
    counts,
    masses,
    choice,
    top_k,
    top_p,
    log_min_p,
    num_parts,
    PARTS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Which edge holds all that pass the filters of a choice.

    Returns:
        The edge, ``EDGES`` if there is none or too much is within it; how many are; the whole row's weight.
    """
    index, part = tl.arange(0, EDGES), tl.arange(0, PARTS)
    place = (choice * EDGES + index[:, None]) * num_parts + part[None, :]
    is_part = part[None, :] < num_parts
    count = tl.sum(tl.load(counts + place, mask=is_part, other=0), 1)
    mass = tl.sum(tl.load(masses + place, mask=is_part, other=0), 1)
    total = tl.max(mass, 0)
    is_enough = edge(index) <= log_min_p
    if top_k > 0:
        is_enough = count >= tl.minimum(top_k, tl.max(count, 0))
    elif top_p < 1.0:
        is_enough = mass >= needed_of(top_p, total)
    least = tl.min(tl.where(is_enough & (count <= LISTED), index, EDGES), 0)
    return least, tl.sum(tl.where(index == least, count, 0), 0), total


@triton.jit(do_not_specialize=["max_rows"])
def gather(
    logits,
    changed,
    wants,
    largest,
    counts,
    masses,
    list_values,
    list_ids,
    size,
    max_rows,
    num_parts,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Lists the entries that may pass a choice's filters, ascending by id, where ``list_of`` says that it can be done.

    Args:
        logits, changed, wants, largest, size, max_rows, num_parts: as in ``weigh``.
        counts, masses: what ``weigh`` found.
        list_values: [max_choices, LISTED] float32, written; list_ids: the same as int32.

    Grid: (max_choices, ⌈V / PART⌉).
    """
    choice, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if choice >= word(wants, NUM_CHOICES):
        return
    values, _, top, temperature, top_k, top_p, log_min_p, _ = choice_of(
        logits, changed, wants, largest, choice, size, max_rows, num_parts, PARTS
    )
    if (temperature == 0) | (top == float("-inf")):
        return
    index, _, _ = list_of(counts, masses, choice, top_k, top_p, log_min_p, num_parts, PARTS, LISTED)
    if index == EDGES:
        return
    before = tl.arange(0, PARTS)
    their = counts + (choice * EDGES + index) * num_parts
    place = tl.sum(tl.load(their + before, mask=before < part, other=0), 0) - 1
    at, value, x, weight = entries(values, part * PART, size, top, temperature, PART)
    is_within = (x >= edge(index)) & (weight > 0)
    place += tl.cumsum(is_within.to(tl.int32), 0)
    tl.store(list_values + choice * LISTED + place, value, mask=is_within)
    tl.store(list_ids + choice * LISTED + place, at, mask=is_within)


@triton.jit
def over(values, size, limit, largest, temperature, mean, stage, TILE: tl.constexpr):
    """What scores at least a limit.

    Returns:
        What these entries weigh (in ``TOP_K`` each 1), the least of their scores, and the largest score under the
        limit.
    """
    held = tl.zeros((TILE,), tl.int64)
    least = tl.full((TILE,), float("inf"), tl.float32)
    under = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, size, TILE):
        _, value, x, weight = entries(values, start, size, largest, temperature, TILE)
        score = scored(x, value, weight, mean, stage)
        is_over = (score >= limit) & (weight > 0)
        held += tl.where(is_over, tl.where(stage == TOP_K, 1, weight), 0)
        least = tl.minimum(least, tl.where(is_over, score, float("inf")))
        under = tl.maximum(under, tl.where(is_over, float("-inf"), score))
    return tl.sum(held, 0), tl.min(least, 0), tl.max(under, 0)


@triton.jit
def mean_of(values, size, largest, temperature, TILE: tl.constexpr):
    """Σ p x, x the scaled values."""
    total = tl.zeros((TILE,), tl.int64)
    moment = tl.zeros((TILE,), tl.int64)
    for start in range(0, size, TILE):
        _, _, x, weight = entries(values, start, size, largest, temperature, TILE)
        total += weight
        x = tl.maximum(x, -64.0)  # of no weight, and its product is a number
        moment += fixed(-x * tl.exp(x))  # at most 1 / e
    return -(tl.sum(moment, 0).to(tl.float64) / tl.sum(total, 0).to(tl.float64)).to(tl.float32)


@triton.jit
def drop(values, size, limit, missing, least, largest, temperature, mean, stage, TILE: tl.constexpr):
    """Makes −∞ of what a filter drops: scores under a limit, and those at it once the ones before hold ``missing``.

    ``least`` is the least weight that may stay. Returns what is kept weighs.
    """
    held = int64(0)
    total = int64(0)
    for start in range(0, size, TILE):
        at, value, x, weight = entries(values, start, size, largest, temperature, TILE)
        score = scored(x, value, weight, mean, stage)
        tied = tl.where(score == limit, weight, 0)
        before = held + tl.cumsum(tied, 0) - tied
        is_kept = ((score > limit) | ((score == limit) & (before < missing))) & (weight >= least)
        tl.store(values + at, tl.where(is_kept, value, float("-inf")), mask=at < size)
        held += tl.sum(tied, 0)
        total += tl.sum(tl.where(is_kept, weight, 0), 0)
    tl.debug_barrier()
    return total


@triton.jit
def reached(values, size, needed, largest, temperature, TILE: tl.constexpr):
    """The first place up to which the entries weigh at least ``needed``, which is over 0."""
    place = 0
    start = 0
    held = int64(0)
    while start < size:
        _, _, _, weight = entries(values, start, size, largest, temperature, TILE)
        total = tl.sum(weight, 0)
        if held + total >= needed:
            place = start + tl.sum((held + tl.cumsum(weight, 0) < needed).to(tl.int32), 0)
            start = size
        held += total
        start += TILE
    return place


@triton.jit
def boundary(values, size, needed, largest, temperature, mean, stage, TILE: tl.constexpr):
    """The largest score at which a run of entries, the best first, holds ``needed``, or all; and what is held above."""
    limit, top = largest - 64.0 * temperature, largest  # what is under it has no weight
    if stage == TYPICAL_P:
        limit, top = -64.0, 0.0
    above = int64(0)
    while limit < top:
        middle = limit + (top - limit) * 0.5
        middle = tl.where((middle > limit) & (middle < top), middle, top)
        held, least, under = over(values, size, middle, largest, temperature, mean, stage, TILE)
        if held >= needed:
            limit = least
        else:
            top = under
            above = held
    return limit, above


@triton.jit
def filtered(
    values,
    size,
    total,
    largest,
    temperature,
    top_k,
    top_p,
    log_min_p,
    typical_p,
    TILE: tl.constexpr,
):
    """Makes −∞ of what does not pass top_k, top_p, min_p and typical_p, each on what those before have left.

    ``values`` may be all of a row's or those that may pass; ``total`` is what all weigh. Returns what is left weighs.
    """
    for stage in range(3):
        limit = float("-inf")
        missing = int64(NO_LIMIT)
        mean = 0.0
        is_on = top_k > 0
        needed = top_k.to(tl.int64)
        if stage != TOP_K:
            share = tl.where(stage == TOP_P, top_p, typical_p)
            is_on = share < 1.0
            needed = needed_of(share, total)
        if is_on:
            if stage == TYPICAL_P:
                mean = mean_of(values, size, largest, temperature, TILE)
            limit, above = boundary(values, size, needed, largest, temperature, mean, stage, TILE)
            if stage != TOP_K:
                missing = needed - above
        least = tl.where(stage == TOP_P, fixed(tl.exp(log_min_p)), 0)
        if is_on | (least > 0):
            total = drop(values, size, limit, missing, least, largest, temperature, mean, stage, TILE)
    return total


@triton.jit
def passed(point, total):
    """The least weight that is over a point of a total."""
    return tl.minimum((point * total.to(tl.float64)).to(tl.int64), total - 1) + 1


@triton.jit
def part_of(masses, needed, num_parts, PARTS: tl.constexpr):
    """The part in which a row's weight reaches ``needed``, and how much of it is still missing there."""
    part = tl.arange(0, PARTS)
    mass = tl.load(masses + part, mask=part < num_parts, other=0)
    is_before = tl.cumsum(mass, 0) < needed
    own = tl.minimum(tl.sum(is_before.to(tl.int32), 0), num_parts - 1)
    return own, needed - tl.sum(tl.where(is_before, mass, 0), 0)


@triton.jit(do_not_specialize=["max_rows"])
def choose(
    logits,
    changed,
    wants,
    found,
    largest,
    first,
    counts,
    masses,
    list_values,
    list_ids,
    size,
    max_rows,
    num_parts,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One token for each choice; −1 where none may come.

    Args:
        logits, changed, wants, size, max_rows, num_parts: as in ``weigh``; rows of ``changed`` may be overwritten.
        found: see ``wanted``; written.
        largest, first: what ``survey`` found; counts, masses: ``weigh``; list_values, list_ids: ``gather``.

    Grid: (max_choices,).
    """
    choice = tl.program_id(0).to(tl.int64)
    if choice >= word(wants, NUM_CHOICES):
        return
    values, line, top, temperature, top_k, top_p, log_min_p, typical_p = choice_of(
        logits, changed, wants, largest, choice, size, max_rows, num_parts, PARTS
    )
    if top == float("-inf"):
        token = -1
    elif temperature == 0:
        part = tl.arange(0, PARTS)
        is_part = part < num_parts
        tops = tl.load(largest + line * num_parts + part, mask=is_part, other=float("-inf"))
        ids = tl.load(first + line * num_parts + part, mask=is_part, other=BEYOND)
        token = tl.min(tl.where(tops == top, ids, BEYOND), 0)
    else:
        point = tl.load(float64s(wants, wants, NUMBERS) + choice * 8 + 4)
        index, count, total = list_of(
            counts, masses, choice, top_k, top_p, log_min_p, num_parts, PARTS, LISTED
        )
        first_id = 0
        num = size
        if index < EDGES:
            values = list_values + choice * LISTED
            num = count
        has_filter = (top_k > 0) | (top_p < 1.0) | (log_min_p > float("-inf")) | (typical_p < 1.0)
        if has_filter:
            total = filtered(values, num, total, top, temperature, top_k, top_p, log_min_p, typical_p, TILE)
            needed = passed(point, total)
        else:
            own, needed = part_of(
                masses + (choice * EDGES + EDGES - 1) * num_parts, passed(point, total), num_parts, PARTS
            )
            first_id = own * PART
            values += first_id
            num = tl.minimum(PART, size - first_id)
        token = first_id + reached(values, num, needed, top, temperature, TILE)
        if index < EDGES:
            token = tl.load(list_ids + choice * LISTED + token)
    tl.store(int32s(found, wants, TOKENS) + choice, token)
