"""What acts on each row by itself: RMS norms, gating, rotary embedding with the write into the KV cache.

Rows are float32; a share of an instruction is some of them.
"""

from __future__ import annotations

import math

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import array_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.int8 import store_head
from manyhats.engine.backends.cpu.int16.quantize import quantize_row
from manyhats.engine.backends.cpu.simd import (
    add,
    div,
    exp,
    fma,
    load,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
    tanh,
    zero,
)

_SQRT_8_OVER_PI = math.sqrt(8.0 / math.pi)


@inner
def norm_row(x, at, weight, size, eps, out, out_at):
    """out[out_at:] = x[at:] / √(mean(x²) + eps) · weight."""
    total = zero()
    for i in range(0, size, 8):
        v = load(x, at + i)
        total = fma(v, v, total)
    scale = splat(np.float32(1.0 / math.sqrt(sum_lanes(total) / np.float32(size) + eps)))
    for i in range(0, size, 8):
        store(out, out_at + i, mul(mul(load(x, at + i), scale), load(weight, i)))


@inner
def add_row(x, at, size, delta):
    """x[at : at + size] += delta[at : at + size]."""
    for i in range(at, at + size, 8):
        store(x, i, add(load(x, i), load(delta, i)))


@inner
def scale_row(x, at, size, factor):
    """x[at : at + size] *= factor."""
    factors = splat(factor)
    for i in range(at, at + size, 8):
        store(x, i, mul(load(x, i), factors))


@inner
def silu_row(x, at, size, out, out_at):
    """out[out_at:] = SiLU(gate) · up; x[at:] holds gate, then up."""
    one = splat(np.float32(1.0))
    for i in range(0, size, 8):
        g = load(x, at + i)
        activated = div(g, add(one, exp(sub(zero(), g))))
        store(out, out_at + i, mul(activated, load(x, at + size + i)))


@inner
def gelu_tanh_row(x, at, size, out, out_at):
    """out[out_at:] = GELU(gate) · up, in the tanh approximation; x[at:] holds gate, then up.

    ``½ · g · (1 + tanh y)`` is ``g / (1 + e⁻²ʸ)``, which loses nothing where tanh is near −1.
    """
    one = splat(np.float32(1.0))
    cubic = splat(np.float32(0.044715))
    factor = splat(np.float32(-_SQRT_8_OVER_PI))
    for i in range(0, size, 8):
        g = load(x, at + i)
        power = mul(factor, fma(mul(mul(g, g), cubic), g, g))
        activated = div(g, add(one, exp(power)))
        store(out, out_at + i, mul(activated, load(x, at + size + i)))


@inner
def cap(x, limit):
    """Each lane as limit · tanh(x / limit)."""
    return mul(limit, tanh(div(x, limit)))


@inner
def cap_row(x, at, size, limit):
    """x[at : at + size] = limit · tanh(x / limit); size at least 8."""
    limits = splat(limit)
    # The last vector of a row may overlap the one before it: read it while that is still as it was.
    last = cap(load(x, at + size - 8), limits)
    for i in range(at, at + size - 7, 8):
        store(x, i, cap(load(x, i), limits))
    store(x, at + size - 8, last)


@inner
def copy_row(x, at, size, out, out_at):
    """out[out_at : out_at + size] = x[at : at + size], rounded if out is bfloat16."""
    for i in range(0, size, 8):
        store(out, out_at + i, load(x, at + i))


@inner
def rowwise(op, numbers, first, last, frame, buffers):
    """Carries out an instruction on rows first … last that needs nothing but its buffers."""
    kind = op[col.INSTRUCTION]
    size = op[col.SIZE]
    source = floats_at(buffers[op[col.SOURCE]])
    target = floats_at(buffers[op[col.TARGET]])
    for row in range(first, last):
        at = row * size
        if kind == col.RMS_NORM:
            norm_row(source, at, floats_at(op[col.WEIGHT]), size, numbers[0], target, at)
        elif kind == col.ADD:
            add_row(target, at, size, source)
        elif kind == col.ADD_RMS_NORM:
            stream = floats_at(buffers[op[col.STREAM]])
            add_row(stream, at, size, source)
            norm_row(stream, at, floats_at(op[col.WEIGHT]), size, numbers[0], target, at)
        elif kind == col.SCALE:
            scale_row(target, at, size, numbers[0])
        elif kind == col.SILU:
            silu_row(source, 2 * at, size, target, at)
        elif kind == col.GELU_TANH:
            gelu_tanh_row(source, 2 * at, size, target, at)
        elif kind == col.GATHER:
            chosen = np.int64(ints_at(frame[col.LOGIT_ROWS])[row]) * size
            copy_row(source, chosen, size, target, at)
        elif kind == col.QUANTIZE:
            words = ints_at(buffers[op[col.TARGET]])
            quantize_row(source, at, size, words, row)
        else:
            cap_row(target, at, size, numbers[0])


@inner
def norm_heads(op, numbers, first, last, buffers):
    """RMS norms of rows' queries and keys, in place, over as many values at a time as a weight has."""
    x = floats_at(buffers[op[col.TARGET]])
    for row in range(first, last):
        start = row * op[col.SIZE]
        middle = start + op[col.QUERY_SIZE]
        for at in range(start, middle, op[col.QUERY_NORMED]):
            norm_row(x, at, floats_at(op[col.QUERY_WEIGHT]), op[col.QUERY_NORMED], numbers[0], x, at)
        for at in range(middle, middle + op[col.KEY_SIZE], op[col.KEY_NORMED]):
            norm_row(x, at, floats_at(op[col.KEY_WEIGHT]), op[col.KEY_NORMED], numbers[0], x, at)


@inner
def rotate(x, at, cos, sin, angle, half):
    """Rotates the pairs (x[i], x[i + half]) at ``at`` by the row's angles, in place."""
    for i in range(0, half, 8):
        first = load(x, at + i)
        second = load(x, at + half + i)
        c = load(cos, angle + i)
        s = load(sin, angle + i)
        store(x, at + i, sub(mul(first, c), mul(second, s)))
        store(x, at + half + i, add(mul(second, c), mul(first, s)))


@inner
def rotate_and_store(op, first, last, frame, buffers, like):
    """Rotary embedding of rows' queries (in place) and keys; keys and values go into their cells.

    A row is queries, keys, values. A layer's keys are [Hkv, num_blocks, K, block_size], its values
    [Hkv, num_blocks, block_size, K], of the dtype of ``like``. Keys lie transposed, so that scores of a block's
    positions are lanes.
    """
    num_kv_heads, head_dim, block_size = frame[col.NUM_KV_HEADS], frame[col.HEAD_DIM], frame[col.BLOCK_SIZE]
    half, num_heads = op[col.HALF], op[col.NUM_HEADS]
    x = floats_at(buffers[op[col.TARGET]])
    cos, sin = floats_at(op[col.COS]), floats_at(op[col.SIN])
    keys = array_at(frame[col.KEYS] + op[col.LAYER] * frame[col.LAYER_BYTES], like)
    values = array_at(frame[col.VALUES] + op[col.LAYER] * frame[col.LAYER_BYTES], like)
    scales = 4 * op[col.LAYER] * frame[col.LAYER_SCALES]
    key_scales, value_scales = (
        floats_at(frame[col.KEY_SCALES] + scales),
        floats_at(frame[col.VALUE_SCALES] + scales),
    )
    for row in range(first, last):
        start = row * op[col.SIZE]
        angle = np.int64(ints_at(frame[col.POSITIONS])[row]) * half
        for head in range(num_heads + num_kv_heads):
            rotate(x, start + head * head_dim, cos, sin, angle, half)
        cell = longs_at(frame[col.CELLS])[row]
        block = cell // block_size
        offset = cell - block * block_size
        for head in range(num_kv_heads):
            source = start + (num_heads + head) * head_dim
            target = (head * frame[col.NUM_BLOCKS] + block) * head_dim * block_size
            scale = (head * frame[col.NUM_BLOCKS] + block) * block_size + offset
            store_head(keys, target + offset, block_size, x, source, head_dim, key_scales, scale)
            source += num_kv_heads * head_dim
            store_head(values, target + offset * head_dim, 1, x, source, head_dim, value_scales, scale)
