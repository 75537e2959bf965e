"""One pass over all logits, spread over the device: what most steps need, and rows that are changed before a choice."""

from __future__ import annotations

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.triton.wanted import (
    BAD,
    EDIT_BIAS,
    EDIT_IDS,
    EDIT_USES,
    INTS,
    MASKS,
    NUM_CHOICES,
    NUM_ROWS,
    NUM_WORDS,
    NUMBERS,
    finite,
    float32s,
    float64s,
    int32s,
    word,
)

LARGEST = tl.constexpr(1e30)
"""Penalties stay within this magnitude, as on the CPU."""
BEYOND = tl.constexpr(2**31 - 1)


@triton.jit
def edited(values, bias, uses, repetition, presence, frequency):
    """Logits after bias and penalties, as ``Choices`` states it: products in float64, each sum rounded to float32."""
    values += bias
    wide = values.to(tl.float64)
    wide = tl.where(values > 0, wide / repetition, wide * repetition)
    wide = tl.minimum(tl.maximum(wide, -LARGEST), LARGEST)
    is_repeated = uses & (repetition != 1.0).to(tl.int32)
    values = tl.where(is_repeated == 1, wide.to(tl.float32), values)
    count = (uses // 2).to(tl.float64)
    penalty = tl.where(count > 0, presence, 0.0) + frequency * count
    return values - penalty.to(tl.float32)


@triton.jit
def edit(row, target, wants, choice, part, PART: tl.constexpr, EDITS: tl.constexpr):
    """Writes the logits of those of a choice's edits that lie in a part; of two for one token the later.

    ``row`` is read, ``target`` written; they are [V] float32.
    """
    ints = int32s(wants, wants, INTS) + choice * 8
    first, last = tl.load(ints + 2), tl.load(ints + 3)
    numbers = float64s(wants, wants, NUMBERS) + choice * 8
    repetition, presence, frequency = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    ids, bias, uses = (
        int32s(wants, wants, EDIT_IDS),
        float32s(wants, wants, EDIT_BIAS),
        int32s(wants, wants, EDIT_USES),
    )
    for start in range(first, last, EDITS):
        e = start + tl.arange(0, EDITS)
        token = tl.load(ids + e, mask=e < last, other=-1)
        after = start + tl.arange(0, EDITS)
        again = tl.load(ids + after, mask=after < last, other=-1)
        is_replaced = tl.sum(
            ((token[:, None] == again[None, :]) & (after[None, :] > e[:, None])).to(tl.int32), 1
        )
        is_own = (e < last) & (token // PART == part) & (is_replaced == 0)
        value = finite(tl.load(row + token, mask=is_own, other=0.0))
        changed = edited(
            value,
            tl.load(bias + e, mask=is_own, other=0.0),
            tl.load(uses + e, mask=is_own, other=0),
            repetition,
            presence,
            frequency,
        )
        tl.store(target + token, changed, mask=is_own)
        tl.debug_barrier()  # a later tile may have the same token


@triton.jit(do_not_specialize=["max_rows"])
def survey(
    logits,
    changed,
    wants,
    found,
    largest,
    first,
    totals,
    size,
    max_rows,
    PART: tl.constexpr,
    EDITS: tl.constexpr,
):
    """The largest value of each part of a row, its first id, and Σ exp(value − largest).

    A line is a row of logits, whose NaNs and infinities count as 0 and are noted; lines from ``max_rows`` on are those
    of the choices that change a row: its logits after edits and mask, written here.

    Args:
        logits: [max_rows, V] float32.
        changed: [max_choices, V] float32, written where a choice changes its row.
        wants, found: see ``wanted``.
        largest: [max_rows + max_choices, parts] float32, written; totals: the same; first: the same as int32.
        size: V.
        max_rows: rows that the buffers have room for.

    Grid: (max_rows + max_choices, ⌈V / PART⌉).
    """
    line, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    choice = line - max_rows
    row = line
    ints = int32s(wants, wants, INTS)
    if choice >= 0:
        if choice >= word(wants, NUM_CHOICES):
            return
        ints += choice * 8
        if tl.load(ints + 5) == 0:
            return
        row = tl.load(ints).to(tl.int64)
    elif row >= word(wants, NUM_ROWS):
        return
    source = logits + row * size
    at = part * PART + tl.arange(0, PART)
    inside = at < size
    raw = tl.load(source + at, mask=inside, other=0.0)
    values = finite(raw)
    place = line * num_parts + part
    if choice >= 0:
        target = changed + choice * size
        if tl.load(ints + 2) < tl.load(ints + 3):
            tl.store(target + at, values, mask=inside)
            tl.debug_barrier()
            edit(source, target, wants, choice, part, PART, EDITS)
            tl.debug_barrier()
            values = tl.load(target + at, mask=inside, other=0.0)
        mask_row = tl.load(ints + 4)
        if mask_row >= 0:
            words = int32s(wants, wants, MASKS) + mask_row * word(wants, NUM_WORDS)
            bits = tl.load(words + at // 32, mask=inside, other=0)
            values = tl.where((bits >> (at % 32)) & 1 == 1, values, float("-inf"))
        tl.store(target + at, values, mask=inside)
    else:
        is_bad = tl.max((tl.abs(raw) < float("inf")).to(tl.int32) ^ 1, 0)
        tl.store(found + word(wants, BAD) + place, is_bad.to(tl.uint8))
    values = tl.where(inside, values, float("-inf"))
    top = tl.max(values, 0)
    tl.store(largest + place, top)
    tl.store(first + place, tl.min(tl.where(values == top, at, BEYOND), 0))
    top = tl.where(top > float("-inf"), top, 0.0)  # where none may come all weigh 0
    tl.store(totals + place, tl.sum(tl.exp(values - top), 0))
