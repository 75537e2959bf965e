"""What acts on each row by itself: norms, activations, rotary embedding with the write into the KV cache.

Rows are float32; a share of an instruction is some of them.
"""

from __future__ import annotations

import math

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import array_at, floats_at, ints_at, longs_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.dense.linear import narrow_row
from manyhats.engine.backends.cpu.int8 import store_head
from manyhats.engine.backends.cpu.int16.quantize import quantize_row
from manyhats.engine.backends.cpu.simd import (
    add,
    alike,
    div,
    erf,
    exp,
    fma,
    load,
    maximum,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
    tanh,
    zero,
)
from manyhats.engine.backends.cpu.wide import LANES
from manyhats.engine.backends.cpu.wide import load as load_wide
from manyhats.engine.backends.cpu.wide import store as store_wide

_SQRT_8_OVER_PI = math.sqrt(8.0 / math.pi)
_SQRT_HALF = math.sqrt(0.5)


@inner
def norm_row(x, at, weight, bias, first, size, is_layer, eps, out, out_at):
    """out[out_at:] = x[at:] / √(mean(x²) + eps) · weight[first:] + bias[first:], of x less its mean if ``is_layer``."""
    mean = np.float32(0.0)
    if is_layer:
        total = zero()
        for i in range(0, size, 8):
            total = add(total, load(x, at + i))
        mean = sum_lanes(total) / np.float32(size)
    means = splat(mean)
    total = zero()
    for i in range(0, size, 8):
        v = sub(load(x, at + i), means)
        total = fma(v, v, total)
    scale = splat(np.float32(1.0 / math.sqrt(sum_lanes(total) / np.float32(size) + eps)))
    for i in range(0, size, 8):
        v = mul(mul(sub(load(x, at + i), means), scale), load(weight, first + i))
        store(out, out_at + i, add(v, load(bias, first + i)))


@inner
def add_row(x, at, size, delta, delta_at):
    """x[at : at + size] += delta[delta_at : delta_at + size]."""
    for i in range(0, size, 8):
        store(x, at + i, add(load(x, at + i), load(delta, delta_at + i)))


@inner
def scale_row(x, at, size, factor):
    """x[at : at + size] *= factor."""
    factors = splat(factor)
    for i in range(at, at + size, 8):
        store(x, i, mul(load(x, i), factors))


@inner
def silu(v):
    """Each lane as v / (1 + e⁻ᵛ)."""
    return div(v, add(alike(v, np.float32(1.0)), exp(sub(alike(v, np.float32(0.0)), v))))


@inner
def gelu_tanh(v):
    """Each lane as GELU in the tanh approximation.

    ``½ · v · (1 + tanh y)`` is ``v / (1 + e⁻²ʸ)``, which loses nothing where tanh is near −1.
    """
    cubic = alike(v, np.float32(0.044715))
    power = mul(alike(v, np.float32(-_SQRT_8_OVER_PI)), fma(mul(mul(v, v), cubic), v, v))
    return div(v, add(alike(v, np.float32(1.0)), exp(power)))


@inner
def gelu(v):
    """Each lane as ``½ · v · (1 + erf(v / √2))``."""
    half = mul(v, alike(v, np.float32(0.5)))
    return fma(half, erf(mul(v, alike(v, np.float32(_SQRT_HALF)))), half)


@inner
def relu(v):
    """Each lane or 0, whichever is larger; NaN stays NaN."""
    return maximum(alike(v, np.float32(0.0)), v)


@inner
def activated(kind, v):
    """Each lane through the activation that an instruction names."""
    if kind == col.SILU:
        return silu(v)
    if kind == col.GELU_TANH:
        return gelu_tanh(v)
    return gelu(v) if kind == col.GELU else relu(v)


@inner
def activate_row(kind, x, at, size, is_gated, out, out_at):
    """out[out_at:] = activation(x[at:]), times what follows the first ``size`` values if these are a gate.

    The size is a multiple of sixteen.
    """
    for i in range(0, size, LANES):
        v = activated(kind, load_wide(x, at + i))
        if is_gated:
            v = mul(v, load_wide(x, at + size + i))
        store_wide(out, out_at + i, v)


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
        if kind == col.NORM:
            norm(op, numbers, source, at, target)
        elif kind == col.ADD:
            add_row(target, at, size, source, at)
        elif kind == col.ADD_NORM:
            stream = floats_at(buffers[op[col.STREAM]])
            add_row(stream, at, size, source, at)
            norm(op, numbers, stream, at, target)
        elif kind == col.LOCATE:
            place = np.int64(ints_at(frame[op[col.WHICH_ROWS]])[row]) + op[col.OFFSET]
            add_row(target, at, size, floats_at(op[col.WEIGHT]), place * size)
        elif kind == col.SCALE:
            scale_row(target, at, size, numbers[0])
        elif kind == col.GATHER:
            chosen = np.int64(ints_at(frame[op[col.WHICH_ROWS]])[row]) * size
            copy_row(source, chosen, size, target, at)
        elif kind == col.SCATTER:
            chosen = np.int64(ints_at(frame[op[col.WHICH_ROWS]])[row]) * size
            copy_row(source, at, size, target, chosen)
        elif kind == col.QUANTIZE:
            words = ints_at(buffers[op[col.TARGET]])
            quantize_row(source, at, size, words, row)
        elif kind == col.NARROW:
            narrow_row(source, at, size, ints_at(buffers[op[col.TARGET]]), row)
        elif kind == col.SOFTCAP:
            cap_row(target, at, size, numbers[0])
        else:
            is_gated = op[col.IS_GATED]
            activate_row(kind, source, at * (1 + is_gated), size, is_gated, target, at)


@inner
def norm(op, numbers, x, at, target):
    """A norm of one row; it may be in place."""
    weight, bias = floats_at(op[col.WEIGHT]), floats_at(op[col.NORM_BIAS])
    norm_row(x, at, weight, bias, 0, op[col.SIZE], op[col.IS_LAYER], numbers[0], target, at)


@inner
def norm_heads(op, numbers, first, last, buffers):
    """Norms of rows' queries and keys, in place, over as many values at a time as a head's weight has."""
    x = floats_at(buffers[op[col.TARGET]])
    for row in range(first, last):
        start = row * op[col.SIZE]
        queries = op[col.QUERY_WEIGHT], op[col.QUERY_BIAS], op[col.QUERY_NORMED], op[col.QUERY_SIZE]
        norm_each_head(op, numbers, x, start, queries)
        keys = op[col.KEY_WEIGHT], op[col.KEY_BIAS], op[col.KEY_NORMED], op[col.KEY_SIZE]
        norm_each_head(op, numbers, x, start + op[col.QUERY_SIZE], keys)


@inner
def norm_each_head(op, numbers, x, start, parts):
    """Norms of a row's queries, or keys; ``parts`` are addresses of weight and bias, and sizes of a head and of all."""
    weight, bias, size, total = parts
    own = 0
    for at in range(start, start + total, size):
        norm_row(x, at, floats_at(weight), floats_at(bias), own, size, op[col.IS_LAYER], numbers[0], x, at)
        own += op[col.HEAD_STRIDE]


@inner
def rotate(x, at, cos, sin, angle, half):
    """Rotates the pairs (x[i], x[i + half]) at ``at`` by the row's angles, in place."""
    whole = half - half % 8
    for i in range(0, whole, 8):
        first = load(x, at + i)
        second = load(x, at + half + i)
        c = load(cos, angle + i)
        s = load(sin, angle + i)
        store(x, at + i, sub(mul(first, c), mul(second, s)))
        store(x, at + half + i, add(mul(second, c), mul(first, s)))
    for i in range(whole, half):
        one, other = x[at + i], x[at + half + i]
        x[at + i] = one * cos[angle + i] - other * sin[angle + i]
        x[at + half + i] = other * cos[angle + i] + one * sin[angle + i]


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
