"""Log-probabilities of tokens in raw logits, their ranks, and a row's most likely tokens; rows share nothing."""

from __future__ import annotations

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.triton.wanted import (
    LOGPROBS,
    NUM_PAIRS,
    PAIRS,
    RANKS,
    TOKENS,
    TOP_IDS,
    TOP_LOGPROBS,
    finite,
    float64s,
    int32s,
    word,
)

BEYOND = tl.constexpr(2**31 - 1)


@triton.jit
def logprobs(
    logits,
    wants,
    found,
    largest,
    first,
    totals,
    size,
    num_parts,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """``value − log Σ exp``, and 1 + how many are larger, of each pair of row and token; the most likely of its row.

    Of parts none of whose values is larger none is looked at. The best of all parts' best is the next most likely; its
    part is then searched for the best behind it, in order of value and id. NaNs and infinities count as 0.

    Args:
        logits: [rows, V] float32.
        wants, found: see ``wanted``.
        largest, first, totals: what ``survey`` found.
        size: V.
        num_parts: at most PARTS.

    Grid: (max_pairs,).
    """
    pair = tl.program_id(0).to(tl.int64)
    if pair >= word(wants, NUM_PAIRS):
        return
    own = int32s(wants, wants, PAIRS) + pair * 4
    row, token, num_top, place = (
        tl.load(own).to(tl.int64),
        tl.load(own + 1),
        tl.load(own + 2),
        tl.load(own + 3),
    )
    if token < 0:
        token = tl.load(int32s(found, wants, TOKENS) - 1 - token)
    if token < 0:
        tl.store(int32s(found, wants, RANKS) + pair, 0)
        return
    source = logits + row * size
    part = tl.arange(0, PARTS)
    in_parts = row * num_parts + part
    tops = tl.load(largest + in_parts, mask=part < num_parts, other=float("-inf"))
    ids = tl.load(first + in_parts, mask=part < num_parts, other=BEYOND)
    best = tl.max(tops, 0)
    sums = tl.load(totals + in_parts, mask=part < num_parts, other=0.0)
    log_total = best.to(tl.float64) + tl.log(tl.sum(sums * tl.exp(tops - best), 0)).to(tl.float64)
    value = finite(tl.load(source + token))
    num_over = tl.zeros((PART,), tl.int32)
    for other_part in range(num_parts):
        if tl.load(largest + row * num_parts + other_part) > value:
            at = other_part * PART + tl.arange(0, PART)
            others = finite(tl.load(source + at, mask=at < size, other=0.0))
            num_over += ((at < size) & (others > value)).to(tl.int32)
    tl.store(int32s(found, wants, RANKS) + pair, tl.sum(num_over, 0) + 1)
    tl.store(float64s(found, wants, LOGPROBS) + pair, value.to(tl.float64) - log_total)
    top_ids, top_logprobs = int32s(found, wants, TOP_IDS), float64s(found, wants, TOP_LOGPROBS)
    for _ in range(num_top):
        top = tl.max(tops, 0)
        top_id = tl.min(tl.where(tops == top, ids, BEYOND), 0)
        tl.store(top_ids + place, top_id)
        tl.store(top_logprobs + place, top.to(tl.float64) - log_total)
        place += 1
        at = top_id // PART * PART + tl.arange(0, PART)
        others = finite(tl.load(source + at, mask=at < size, other=0.0))
        is_behind = (at < size) & ((others < top) | ((others == top) & (at > top_id)))
        others = tl.where(is_behind, others, float("-inf"))
        next_top = tl.max(others, 0)
        next_id = tl.min(tl.where(is_behind & (others == next_top), at, BEYOND), 0)
        is_its = part == top_id // PART
        tops = tl.where(is_its, next_top, tops)
        ids = tl.where(is_its, next_id, ids)
