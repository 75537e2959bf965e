"""Bottleneck adapters on a sub-layer's output m, r being the stream that entered it; N is the norm of the stream.

Elsewhere on the stream m and r are the stream itself, the same memory.

``read`` takes what each row's adapter reads, ``deltas.shrink`` multiplies that by the first matrix, ``widen`` activates
and multiplies by the second, ``leave`` puts m' in the place of m. Rows are read whole by one program, so that a norm's
sums are the same in any step.
"""

import triton
import triton.language as tl

from manyhats.engine.backends.cuda.record import BottleneckWord, Source, StreamNorm
from manyhats.engine.backends.cuda.triton.activations import activated_by, sigmoid
from manyhats.engine.backends.cuda.triton.deltas import (
    VARYING,
    integer,
    matrix,
    number,
    padded,
    segment,
    shrunk,
    vector,
)
from manyhats.engine.backends.cuda.triton.gates import GATES

UP = tl.constexpr(int(BottleneckWord.UP))
SIZE = tl.constexpr(int(BottleneckWord.SIZE))
DOWN_BIAS = tl.constexpr(int(BottleneckWord.DOWN_BIAS))
UP_BIAS = tl.constexpr(int(BottleneckWord.UP_BIAS))
SCALE = tl.constexpr(int(BottleneckWord.SCALE))
BEFORE_WEIGHT = tl.constexpr(int(BottleneckWord.BEFORE_WEIGHT))
BEFORE_BIAS = tl.constexpr(int(BottleneckWord.BEFORE_BIAS))
BEFORE_EPS = tl.constexpr(int(BottleneckWord.BEFORE_EPS))
AFTER_WEIGHT = tl.constexpr(int(BottleneckWord.AFTER_WEIGHT))
AFTER_BIAS = tl.constexpr(int(BottleneckWord.AFTER_BIAS))
AFTER_EPS = tl.constexpr(int(BottleneckWord.AFTER_EPS))
ACTIVATION = tl.constexpr(int(BottleneckWord.ACTIVATION))
INPUT = tl.constexpr(int(BottleneckWord.INPUT))
NORM_RESIDUAL = tl.constexpr(int(BottleneckWord.NORM_RESIDUAL))
SKIPS_NORM = tl.constexpr(int(BottleneckWord.SKIPS_NORM))
KEEP = tl.constexpr(int(BottleneckWord.KEEP))
CARRY = tl.constexpr(int(BottleneckWord.CARRY))
CARRY_NORMED = tl.constexpr(int(BottleneckWord.CARRY_NORMED))
GATE = tl.constexpr(int(BottleneckWord.GATE))
FIRST = tl.constexpr(int(BottleneckWord.FIRST))
LAST = tl.constexpr(int(BottleneckWord.LAST))
IS_SPLIT = tl.constexpr(int(BottleneckWord.IS_SPLIT))

NOTHING = tl.constexpr(int(Source.NOTHING))
OUTPUT = tl.constexpr(int(Source.OUTPUT))
SUM = tl.constexpr(int(Source.SUM))
RESIDUAL = tl.constexpr(int(Source.RESIDUAL))
NORMED = tl.constexpr(int(Source.NORMED))

NO_NORM = tl.constexpr(int(StreamNorm.NONE))
LAYER = tl.constexpr(int(StreamNorm.LAYER))


@triton.jit
def stream_normed(v, c, inside, mean, factor, weight, bias, HAS_BIAS: tl.constexpr):
    """N of r + m at some columns, given its mean and factor."""
    v = (v - mean) * factor * tl.load(weight + c, mask=inside, other=0.0)
    if HAS_BIAS:
        v += tl.load(bias + c, mask=inside, other=0.0)
    return v


@triton.jit
def source(
    kind, r, m, c, inside, mean, factor, weight, bias, NORM: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Nothing, m, r + m, r or N(r + m) of a row at columns c; 0 where not ``inside``."""
    v = tl.zeros(c.shape, tl.float32)
    if kind != NOTHING:
        if kind != RESIDUAL:
            v += tl.load(m + c, mask=inside, other=0.0)
        if kind != OUTPUT:
            v += tl.load(r + c, mask=inside, other=0.0)
    if NORM != NO_NORM:  # noqa: SIM102 - the outer condition is the compiler's
        if kind == NORMED:
            v = stream_normed(v, c, inside, mean, factor, weight, bias, HAS_BIAS)
    return v


@triton.jit
def moments(
    kind, f, r, m, D, mean, factor, weight, bias, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean of a source, plus f where that ``ADDS``, and ``1 / √(mean of squares about it + eps)``."""
    own_mean = 0.0
    if IS_CENTRED:
        total = tl.zeros((BLOCK,), tl.float32)
        for c0 in range(0, D, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            v = source(kind, r, m, c, c < D, mean, factor, weight, bias, NORM, HAS_BIAS)
            if ADDS:
                v += tl.load(f + c, mask=c < D, other=0.0)
            total += v
        own_mean = tl.sum(total) / D
    squares = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(0, D, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        v = source(kind, r, m, c, c < D, mean, factor, weight, bias, NORM, HAS_BIAS)
        if ADDS:
            v += tl.load(f + c, mask=c < D, other=0.0)
        v = tl.where(c < D, v - own_mean, 0.0)
        squares += v * v
    return own_mean, 1.0 / tl.sqrt(tl.sum(squares) / D + eps)


@triton.jit
def part_of(entry, size, within, place):
    """Which of a bottleneck's values rows have, from the first one to before the last one, by ``TextEnds.part``.

    within [places, 2] int32: a row's place in its text, and the text's rows.
    """
    row, length = tl.load(within + place * 2), tl.load(within + place * 2 + 1)
    half = tl.where(integer(entry + IS_SPLIT) != 0, size // 2, 0)
    is_last = row >= length - integer(entry + LAST)
    end = tl.where(row < integer(entry + FIRST), size - half, 0)
    return tl.where(is_last, half, 0), tl.where(is_last, size, end)


@triton.jit
def has_part(entry, within, place, HAS_ENDS: tl.constexpr):
    """Whether a row passes through its adapter's bottleneck, if there is one."""
    size = integer(entry + SIZE)
    start, end = 0, size
    if HAS_ENDS:
        start, end = part_of(entry, size, within, place)
    return start < end


@triton.jit(do_not_specialize=VARYING)
def read(
    r, m, x, gates, rows, slots, num_rows, records, RECORD, at, D, weight, bias, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x[place] = norm_before(source)`` in bfloat16, for one row, and ``gates[place, 0] = σ(source · w + b)``.

    r, m [N, D] float32; x [places, D]; gates [places, GATES] float32, if ``HAS_GATES``; rows, slots [places] int32;
    weight, bias [D] float32 and eps: of N, which ``NORM`` says there is.

    Grid: (places,).
    """
    place = tl.program_id(0)
    if place < tl.load(num_rows):
        entry = records + tl.load(slots + place) * RECORD + at
        if integer(entry + SIZE) > 0:
            row, kind = tl.load(rows + place), integer(entry + INPUT)
            r += row * D
            m += row * D
            mean, factor = 0.0, 0.0
            if NORM != NO_NORM:  # noqa: SIM102 - the outer condition is the compiler's
                if kind == NORMED:
                    mean, factor = moments(
                        SUM, m, r, m, D, 0.0, 0.0, weight, bias, eps, NORM, HAS_BIAS, False, NORM == LAYER, BLOCK
                    )  # fmt: skip
            has_before = tl.load(entry + BEFORE_WEIGHT) != 0
            own_mean, own_factor = 0.0, 0.0
            if has_before:
                own_mean, own_factor = moments(
                    kind, m, r, m, D, mean, factor, weight, bias, number(entry + BEFORE_EPS),
                    NORM, HAS_BIAS, False, True, BLOCK,
                )  # fmt: skip
            has_gate = False
            if HAS_GATES:
                has_gate = tl.load(entry + GATE) != 0
            opened = tl.zeros((BLOCK,), tl.float32)
            for c0 in range(0, D, BLOCK):
                c = c0 + tl.arange(0, BLOCK)
                v = source(kind, r, m, c, c < D, mean, factor, weight, bias, NORM, HAS_BIAS)
                if has_gate:
                    opened += tl.where(c < D, v, 0.0) * tl.load(
                        vector(entry + GATE) + c, mask=c < D, other=0.0
                    )
                if has_before:
                    v = (v - own_mean) * own_factor
                    v *= tl.load(vector(entry + BEFORE_WEIGHT) + c, mask=c < D, other=0.0)
                    v += tl.load(vector(entry + BEFORE_BIAS) + c, mask=c < D, other=0.0)
                tl.store(x + place * D + c, v.to(tl.bfloat16), mask=c < D)
            if has_gate:
                opened_by = sigmoid(tl.sum(opened) + tl.load(vector(entry + GATE) + D))
                tl.store(gates + place * GATES, opened_by)


@triton.jit(do_not_specialize=VARYING)
def widen(
    t, f, gates, within, segments, num_segments, records, RECORD, at, D, T_ROWS, SIZES,
    SPLITS: tl.constexpr, HAS_GATES: tl.constexpr, HAS_ENDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """``f[place] = g · scale · (act(Σ t[:, place] + down_bias) U + up_bias)``; of act, what rows have of it.

    t as ``shrink`` left it, with one part; f [places, D] float32; g is gates[place, 0], or 1; within [places, 2] int32
    as ``part_of`` reads it, if ``HAS_ENDS``; what is activated is rounded to bfloat16. Biases are padded with zeros to
    whole tiles, and what is activated beyond the size meets zeros in U.

    Grid: (segments, D / BN).
    """
    s, c = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    if s < tl.load(num_segments):
        slot, first, count = segment(segments, s)
        entry = records + slot * RECORD + at
        size = integer(entry + SIZE)
        if size > 0:
            up, stride, activation = matrix(entry + UP), padded(D), integer(entry + ACTIVATION)
            i = tl.arange(0, BM)
            place = first + i
            if HAS_ENDS:
                start, end = part_of(entry, size, within, tl.where(i < count, place, first))
            total = tl.zeros((BM, BN), tl.float32)
            for r0 in range(0, size, BR):
                r = r0 + tl.arange(0, BR)
                T = shrunk(t, place, 0, r, i < count, T_ROWS, SIZES, 1, SPLITS)
                T = activated_by(activation, T + tl.load(vector(entry + DOWN_BIAS) + r)[None, :])
                if HAS_ENDS:
                    T = tl.where((r[None, :] >= start[:, None]) & (r[None, :] < end[:, None]), T, 0.0)
                W = tl.load(
                    up + r[:, None] * stride + c[None, :],
                    mask=(r < size)[:, None] & (c < D)[None, :],
                    other=0.0,
                )
                total = tl.dot(T.to(tl.bfloat16), W, total)
            total += tl.load(vector(entry + UP_BIAS) + c, mask=c < D, other=0.0)[None, :]
            total *= tl.load(vector(entry + SCALE) + c, mask=c < D, other=0.0)[None, :]
            if HAS_GATES:  # noqa: SIM102 - the outer condition is the compiler's
                if tl.load(entry + GATE) != 0:
                    total *= tl.load(gates + place * GATES, mask=i < count, other=0.0)[:, None]
            tl.store(f + place[:, None] * D + c[None, :], total, mask=(i < count)[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def leave(
    r, m, f, within, rows, slots, num_rows, records, RECORD, at, D, weight, bias, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``m[row] = keep · m + carry · r + carry_normed · N(r + m) + (f, or norm_after(f + norm_residual))``, in place.

    r, m [N, D] and f [places, D] float32; within as in ``widen``, the others as in ``read``.

    Grid: (places,).
    """
    place = tl.program_id(0)
    if place < tl.load(num_rows):
        entry = records + tl.load(slots + place) * RECORD + at
        if has_part(entry, within, place, HAS_ENDS):
            row, kind = tl.load(rows + place), integer(entry + NORM_RESIDUAL)
            r += row * D
            m += row * D
            f += place * D
            keep, carry = number(entry + KEEP), number(entry + CARRY)
            carry_normed = number(entry + CARRY_NORMED)
            mean, factor = 0.0, 0.0
            if NORM != NO_NORM:  # noqa: SIM102 - the outer condition is the compiler's
                if (kind == NORMED) | (carry_normed != 0.0):
                    mean, factor = moments(
                        SUM, m, r, m, D, 0.0, 0.0, weight, bias, eps, NORM, HAS_BIAS, False, NORM == LAYER, BLOCK
                    )  # fmt: skip
            has_after = tl.load(entry + AFTER_WEIGHT) != 0
            own_mean, own_factor = 0.0, 0.0
            if has_after:
                own_mean, own_factor = moments(
                    kind, f, r, m, D, mean, factor, weight, bias, number(entry + AFTER_EPS),
                    NORM, HAS_BIAS, True, True, BLOCK,
                )  # fmt: skip
            for c0 in range(0, D, BLOCK):
                c = c0 + tl.arange(0, BLOCK)
                v = tl.load(f + c, mask=c < D, other=0.0)
                if has_after:
                    v += source(kind, r, m, c, c < D, mean, factor, weight, bias, NORM, HAS_BIAS)
                    v = (v - own_mean) * own_factor
                    v *= tl.load(vector(entry + AFTER_WEIGHT) + c, mask=c < D, other=0.0)
                    v += tl.load(vector(entry + AFTER_BIAS) + c, mask=c < D, other=0.0)
                output = tl.load(m + c, mask=c < D, other=0.0)
                residual = tl.load(r + c, mask=c < D, other=0.0)
                v += keep * output + carry * residual
                if NORM != NO_NORM:  # noqa: SIM102 - the outer condition is the compiler's
                    if carry_normed != 0.0:
                        normed = stream_normed(
                            residual + output, c, c < D, mean, factor, weight, bias, HAS_BIAS
                        )
                        v += carry_normed * normed
                tl.store(m + c, v, mask=c < D)


@triton.jit(do_not_specialize=VARYING)
def skip_norm(
    r, m, stream, within, rows, slots, num_rows, records, RECORD, at, D, HAS_ENDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``stream[row] = r + m'`` for rows whose adapter skips the norm that the stream has had; all [N, D] float32.

    within is as in ``widen``.

    Grid: (places, D / BLOCK).
    """
    place, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if place < tl.load(num_rows):
        entry = records + tl.load(slots + place) * RECORD + at
        if (integer(entry + SKIPS_NORM) != 0) & has_part(entry, within, place, HAS_ENDS):
            to = tl.load(rows + place) * D + c
            v = tl.load(r + to, mask=c < D, other=0.0) + tl.load(m + to, mask=c < D, other=0.0)
            tl.store(stream + to, v, mask=c < D)
