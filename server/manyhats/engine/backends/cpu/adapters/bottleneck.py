"""Bottleneck adapters on a sub-layer's output; each row by its own, of any size.

What a row computes stands in ``manyhats.adapters.primitives.Bottleneck``.
"""

from __future__ import annotations

import math

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.low_rank import expand, shrink
from manyhats.engine.backends.cpu.adapters.texts import gate_of, text_of
from manyhats.engine.backends.cpu.addresses import bytes_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.rowwise import copy_row, norm_row, scale_row
from manyhats.engine.backends.cpu.simd import (
    add,
    fma,
    load,
    load_address,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
    zero,
)

# Columns of the address table.
DOWN, DOWN_BIAS, UP, UP_BIAS, SCALE, BEFORE_WEIGHT, BEFORE_BIAS, AFTER_WEIGHT, AFTER_BIAS, GATE = range(10)
NUM_ADDRESSES = 10
# Columns of the integer table; a size of 0 is a slot without an adapter here.
SIZE, ACTIVATION, INPUT, NORM_RESIDUAL, SKIPS_NORM, HAS_ENDS, FIRST, LAST, IS_SPLIT = range(9)
NUM_INTEGERS = 9
# Columns of the number table.
KEEP, CARRY, CARRY_NORMED, BEFORE_EPS, AFTER_EPS = range(5)
NUM_NUMBERS = 5
# Columns of the table of sub-layers: which layers have bottlenecks, which have some that skip the norm of the stream,
# and which some with gates; and per layer and slot, the rows of those tables.
HAS_BOTTLENECKS, HAS_SKIPS, HAS_GATES, ADDRESSES, INTEGERS, NUMBERS = range(6)
NUM_TABLE_COLUMNS = 6
# Values of INPUT and NORM_RESIDUAL.
NOTHING, OUTPUT, SUM, RESIDUAL, NORMED = range(5)

ACTIVATIONS = (
    "linear",
    "relu",
    "gelu",
    "gelu_pytorch_tanh",
    "silu",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "quick_gelu",
    "mish",
    "relu6",
    "relu2",
    "hardswish",
    "laplace",
    "gelu_10",
    "sqrtsoftplus",
)
"""The activations that ``activate`` knows, by index."""

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


@inner
def sigmoid(v):
    """1 / (1 + e⁻ᵛ), without overflow."""
    if v >= 0.0:
        return 1.0 / (1.0 + math.exp(-v))
    e = math.exp(v)
    return e / (1.0 + e)


@inner
def activate(kind, v):
    """One value through an activation, in float64."""
    if kind == 1:
        return max(v, 0.0)
    if kind == 2:
        return 0.5 * v * (1.0 + math.erf(v * _SQRT_HALF))
    if kind == 3:
        return 0.5 * v * (1.0 + math.tanh(_SQRT_2_OVER_PI * (v + 0.044715 * v * v * v)))
    if kind == 4:
        return v * sigmoid(v)
    if kind == 5:
        return math.tanh(v)
    if kind == 6:
        return sigmoid(v)
    if kind == 7:
        return v if v >= 0.0 else 0.01 * v
    if kind == 8:
        return v * sigmoid(1.702 * v)
    if kind == 9:
        return v * math.tanh(max(v, 0.0) + math.log1p(math.exp(-abs(v))))
    if kind == 10:
        return min(max(v, 0.0), 6.0)
    if kind == 11:
        return max(v, 0.0) * max(v, 0.0)
    if kind == 12:
        return v * min(max(v + 3.0, 0.0), 6.0) / 6.0
    if kind == 13:
        return 0.5 * (1.0 + math.erf((v - 0.707107) / (0.282095 * math.sqrt(2.0))))
    if kind == 14:
        return min(max(0.5 * v * (1.0 + math.erf(v * _SQRT_HALF)), -10.0), 10.0)
    if kind == 15:
        return math.sqrt(max(v, 0.0) + math.log1p(math.exp(-abs(v))))
    return v


@inner
def layer_norm(x, at, size, weight, bias, eps, f32):
    """x[at : at + size] = (x − mean) / √(variance + eps) · weight + bias, in place."""
    total = zero()
    for i in range(at, at + size, 8):
        total = add(total, load(x, i))
    mean = splat(np.float32(sum_lanes(total) / np.float32(size)))
    squares = zero()
    for i in range(at, at + size, 8):
        v = sub(load(x, i), mean)
        squares = fma(v, v, squares)
    factor = splat(np.float32(1.0 / math.sqrt(sum_lanes(squares) / np.float32(size) + eps)))
    for i in range(0, size, 8):
        v = mul(sub(load(x, at + i), mean), factor)
        store(x, at + i, fma(v, load_address(weight + 4 * i, f32), load_address(bias + 4 * i, f32)))


@inner
def pick(kind, residual, output, start, size, op, op_numbers, scratch, at):
    """scratch[at : at + size] = what a bottleneck reads of a row: m, r + m, r, or the norm of r + m."""
    for i in range(0, size, 8):
        if kind == OUTPUT:
            v = load(output, start + i)
        elif kind == RESIDUAL:
            v = load(residual, start + i)
        else:
            v = add(load(residual, start + i), load(output, start + i))
        store(scratch, at + i, v)
    if kind == NORMED and op[col.STREAM_WEIGHT] != 0:
        weight, bias = floats_at(op[col.STREAM_WEIGHT]), floats_at(op[col.STREAM_BIAS])
        is_layer, eps = op[col.IS_STREAM_LAYER], op_numbers[0]
        norm_row(scratch, at, weight, bias, 0, size, is_layer, eps, scratch, at)


@inner
def ends_part(integers, row, frame):
    """Which values of a bottleneck a row has, from … to; of a text's row between its ends none."""
    text = np.int64(text_of(row, frame))
    starts = ints_at(frame[col.QUERY_START])
    size = np.int64(integers[SIZE])
    half = size // 2 if integers[IS_SPLIT] else np.int64(0)
    if row >= starts[text + 1] - integers[LAST]:
        return half, size
    return np.int64(0), size - half if row < starts[text] + integers[FIRST] else np.int64(0)


@inner
def row_delta(
    residual,
    output,
    start,
    size,
    op,
    op_numbers,
    addresses,
    integers,
    numbers,
    gate,
    part,
    like,
    f32,
    scratch,
    at,
):
    """Leaves f, or norm_after(f + norm_residual), in scratch[at : at + size]; gate and part are the row's."""
    source = at + size
    inside = source + size
    pick(integers[INPUT], residual, output, start, size, op, op_numbers, scratch, source)
    if addresses[BEFORE_WEIGHT] != 0:
        layer_norm(
            scratch, source, size, addresses[BEFORE_WEIGHT], addresses[BEFORE_BIAS], numbers[BEFORE_EPS], f32
        )
    width = integers[SIZE]
    shrink(scratch, source, size, addresses[DOWN], width, like, scratch, inside)
    for j in range(0, width, 8):  # vectors are padded to eight, and so is this part of the scratch
        biased = add(load(scratch, inside + j), load_address(addresses[DOWN_BIAS] + 4 * j, f32))
        store(scratch, inside + j, biased)
    for j in range(width):
        value = activate(integers[ACTIVATION], np.float64(scratch[inside + j]))
        scratch[inside + j] = np.float32(value) if part[0] <= j < part[1] else np.float32(0.0)
    for i in range(0, size, 8):
        store(scratch, at + i, load_address(addresses[UP_BIAS] + 4 * i, f32))
    expand(scratch, inside, width, addresses[UP], size, like, np.float32(1.0), scratch, at)
    for i in range(0, size, 8):
        store(scratch, at + i, mul(load(scratch, at + i), load_address(addresses[SCALE] + 4 * i, f32)))
    if addresses[GATE] != 0:
        scale_row(scratch, at, size, gate)
    if addresses[AFTER_WEIGHT] != 0:
        if integers[NORM_RESIDUAL] != NOTHING:
            pick(integers[NORM_RESIDUAL], residual, output, start, size, op, op_numbers, scratch, source)
            for i in range(0, size, 8):
                store(scratch, at + i, add(load(scratch, at + i), load(scratch, source + i)))
        layer_norm(scratch, at, size, addresses[AFTER_WEIGHT], addresses[AFTER_BIAS], numbers[AFTER_EPS], f32)


@inner
def table_of(op, frame):
    """The table of an instruction's sub-layer."""
    return longs_at(frame[col.SUBLAYER_TABLES] + 8 * NUM_TABLE_COLUMNS * op[col.GROUP])


@inner
def num_bottleneck_shares(op, frame):
    """A share is a row."""
    if frame[col.NUM_ADAPTER_ROWS] == 0:
        return 0
    table = table_of(op, frame)
    return frame[col.NUM_ADAPTER_ROWS] if bytes_at(table[HAS_BOTTLENECKS])[op[col.LAYER]] else 0


@inner
def bottleneck(op, op_numbers, share, frame, buffers, like, scratch, at):
    """Output = keep · m + carry · r + carry_normed · N(r + m) + the row's bottleneck, for one row, if it has one.

    Args:
        op: source is the stream r that entered the sub-layer, target its output m; and the norm N behind it.
        op_numbers: its eps.
        share: index among the rows with an adapter.
        frame, buffers: of the step.
        like: an array of the adapters' dtype.
        scratch: from ``at`` on, 2·D + the largest size rounded up to eight.
    """
    table = table_of(op, frame)
    entry = op[col.LAYER] * frame[col.NUM_SLOTS] + ints_at(frame[col.ADAPTER_SLOTS])[share]
    integers = ints_at(table[INTEGERS] + 4 * NUM_INTEGERS * entry)
    if integers[SIZE] == 0:
        return
    addresses = longs_at(table[ADDRESSES] + 8 * NUM_ADDRESSES * entry)
    numbers = floats_at(table[NUMBERS] + 4 * NUM_NUMBERS * entry)
    residual, output = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    size = op[col.SIZE]
    row = np.int64(ints_at(frame[col.ADAPTER_ROWS])[share])
    start = row * size
    part = np.int64(0), np.int64(integers[SIZE])
    if integers[HAS_ENDS]:
        part = ends_part(integers, row, frame)
        if part[0] == part[1]:
            return
    gate = np.float32(1.0)
    if addresses[GATE] != 0:
        gate = gate_of(op, row, 0, frame, buffers)
    row_delta(
        residual,
        output,
        start,
        size,
        op,
        op_numbers,
        addresses,
        integers,
        numbers,
        gate,
        part,
        like,
        scratch,
        scratch,
        at,
    )
    if numbers[CARRY_NORMED] != 0.0:
        normed = at + size
        pick(NORMED, residual, output, start, size, op, op_numbers, scratch, normed)
        factor = splat(numbers[CARRY_NORMED])
        for i in range(0, size, 8):
            store(scratch, at + i, fma(load(scratch, normed + i), factor, load(scratch, at + i)))
    keep = splat(numbers[KEEP])
    carry = splat(numbers[CARRY])
    for i in range(0, size, 8):
        v = fma(load(output, start + i), keep, load(scratch, at + i))
        store(output, start + i, fma(load(residual, start + i), carry, v))


@inner
def num_unnormed_shares(op, frame):
    """A share is a row."""
    if frame[col.NUM_ADAPTER_ROWS] == 0:
        return 0
    table = table_of(op, frame)
    return frame[col.NUM_ADAPTER_ROWS] if bytes_at(table[HAS_SKIPS])[op[col.LAYER]] else 0


@inner
def unnormed(op, share, frame, buffers):
    """Target = source, for one row, if its bottleneck skips the norm of the stream."""
    table = table_of(op, frame)
    entry = op[col.LAYER] * frame[col.NUM_SLOTS] + ints_at(frame[col.ADAPTER_SLOTS])[share]
    if ints_at(table[INTEGERS] + 4 * NUM_INTEGERS * entry)[SKIPS_NORM] == 0:
        return
    start = np.int64(ints_at(frame[col.ADAPTER_ROWS])[share]) * op[col.SIZE]
    source, target = floats_at(buffers[op[col.SOURCE]]), floats_at(buffers[op[col.TARGET]])
    copy_row(source, start, op[col.SIZE], target, start)
