"""Gates: what all rows of a text share, the mean of a sigmoid over them.

``open_gates`` has the sigmoid of each row by itself, ``close_gates`` the means. A mean's sum is cut from the text's
first row on, so it is the same in any step.
"""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda import record
from manyhats.engine.backends.cuda.triton.activations import sigmoid
from manyhats.engine.backends.cuda.triton.deltas import VARYING, segment, vector

GATES = tl.constexpr(record.GATES)


@triton.jit
def gate_word(records, slot, RECORD, at, STEP, prefix, g, MEMBERS: tl.constexpr):
    """The word of a place's g-th gate: of its members, ``STEP`` words apart, and then of the KV prefix."""
    return records + slot * RECORD + tl.where(g < MEMBERS, at + g * STEP, prefix + g - MEMBERS)


@triton.jit(do_not_specialize=[*VARYING, "prefix"])
def open_gates(
    x, gates, rows, slots, num_rows, records, RECORD, at, STEP, prefix, K,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``gates[place, g] = σ(x[rows[place]] · w + b)``, where there is such a gate.

    x [N, K] bfloat16 or float32; gates [places, GATES] float32; rows, slots [places] int32; w [K] float32.

    Grid: (places, MEMBERS, and two more with a KV prefix).
    """
    place, g = tl.program_id(0), tl.program_id(1)
    if place < tl.load(num_rows):
        word = gate_word(records, tl.load(slots + place), RECORD, at, STEP, prefix, g, MEMBERS)
        if tl.load(word) != 0:
            w, row = vector(word), tl.load(rows + place).to(tl.int64)
            total = tl.zeros((BLOCK,), tl.float32)
            for k0 in range(0, K, BLOCK):
                k = k0 + tl.arange(0, BLOCK)
                X = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
                total += X * tl.load(w + k, mask=k < K, other=0.0)
            tl.store(gates + place * GATES + g, sigmoid(tl.sum(total) + tl.load(w + K)))


@triton.jit(do_not_specialize=[*VARYING, "prefix"])
def close_gates(
    gates, factors, texts, num_texts, records, RECORD, at, STEP, prefix,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``gates[place, g]`` = its mean over the places of the text; ``factors[text]`` = those of its KV prefix, or 1.

    gates [places, GATES] as ``open_gates`` left them; factors [texts, 2] float32, for the gates from MEMBERS on; texts
    [texts, 3] int32.

    Grid: as ``open_gates``, with texts for places.
    """
    text, g = tl.program_id(0), tl.program_id(1)
    if text < tl.load(num_texts):
        slot, first, count = segment(texts, text)
        word = gate_word(records, slot, RECORD, at, STEP, prefix, g, MEMBERS)
        mean = 1.0
        if tl.load(word) != 0:
            total = tl.zeros((BLOCK,), tl.float32)
            for i0 in range(0, count, BLOCK):
                i = i0 + tl.arange(0, BLOCK)
                total += tl.load(gates + (first + i) * GATES + g, mask=i < count, other=0.0)
            mean = tl.sum(total) / count
            if g < MEMBERS:
                for i0 in range(0, count, BLOCK):
                    i = i0 + tl.arange(0, BLOCK)
                    tl.store(gates + (first + i) * GATES + g, mean, mask=i < count)
        if g >= MEMBERS:
            tl.store(factors + text * 2 + g - MEMBERS, mean)
