"""What acts on each row by itself: RMS norms, gating, rotary embedding with the write into the KV cache."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from manyhats.engine.backends.cpu.compile import inner, kernel
from manyhats.engine.backends.cpu.simd import (
    add,
    div,
    exp,
    fma,
    load,
    mul,
    splat,
    store,
    store_scalar,
    sub,
    sum_lanes,
    tanh,
    zero,
)

_SQRT_8_OVER_PI = math.sqrt(8.0 / math.pi)


@inner
def norm_row(x, at, weight, eps, out):
    """out[at:] = x[at:] / √(mean(x²) + eps) · weight."""
    size = weight.size
    total = zero()
    for i in range(0, size, 8):
        v = load(x, at + i)
        total = fma(v, v, total)
    scale = splat(np.float32(1.0 / math.sqrt(sum_lanes(total) / np.float32(size) + eps)))
    for i in range(0, size, 8):
        store(out, at + i, mul(mul(load(x, at + i), scale), load(weight, i)))


@kernel
def rms_norm(x, weight, eps, out, num_threads):
    """Root mean square norm of each row; x and out [N, D] float32, weight [D] float32."""
    num_rows, size = x.shape
    flat_x = x.reshape(-1)
    flat_out = out.reshape(-1)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            norm_row(flat_x, row * size, weight, eps, flat_out)


@kernel
def add_rms_norm(residual, delta, weight, eps, out, num_threads):
    """Residual += delta, then out = the norm of residual; all [N, D] float32."""
    num_rows, size = residual.shape
    flat_residual = residual.reshape(-1)
    flat_delta = delta.reshape(-1)
    flat_out = out.reshape(-1)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            at = row * size
            for i in range(at, at + size, 8):
                store(flat_residual, i, add(load(flat_residual, i), load(flat_delta, i)))
            norm_row(flat_residual, at, weight, eps, flat_out)


@kernel
def norm_queries_and_keys(qkv, q_weight, k_weight, eps, num_queries, num_keys, num_threads):
    """Root mean square norms of queries and keys, in place, over as many values at a time as a weight has.

    Args:
        qkv: [N, (H + 2·Hkv)·K] float32: queries, keys, values.
        q_weight: [K] for each head by itself, or [H·K]; float32.
        k_weight: [K] or [Hkv·K].
        num_queries: H·K.
        num_keys: Hkv·K.
    """
    num_rows, width = qkv.shape
    flat = qkv.reshape(-1)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            start = row * width
            for at in range(start, start + num_queries, q_weight.size):
                norm_row(flat, at, q_weight, eps, flat)
            start += num_queries
            for at in range(start, start + num_keys, k_weight.size):
                norm_row(flat, at, k_weight, eps, flat)


@kernel
def silu_mul(gate_up, out, num_threads):
    """Out = SiLU(gate) · up; gate_up [N, 2·I] holds gate, then up; out [N, I]; float32."""
    num_rows, size = out.shape
    flat = gate_up.reshape(-1)
    flat_out = out.reshape(-1)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            gate = row * 2 * size
            up = gate + size
            at = row * size
            one = splat(np.float32(1.0))
            for i in range(0, size, 8):
                g = load(flat, gate + i)
                activated = div(g, add(one, exp(sub(zero(), g))))
                store(flat_out, at + i, mul(activated, load(flat, up + i)))


@kernel
def gelu_tanh_mul(gate_up, out, num_threads):
    """Out = gelu(gate) · up in the tanh approximation; shapes as in ``silu_mul``.

    ½ · g · (1 + tanh y) is g / (1 + e⁻²ʸ), which loses nothing where tanh is near −1.
    """
    num_rows, size = out.shape
    flat = gate_up.reshape(-1)
    flat_out = out.reshape(-1)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            gate = row * 2 * size
            up = gate + size
            at = row * size
            one = splat(np.float32(1.0))
            cubic = splat(np.float32(0.044715))
            factor = splat(np.float32(-_SQRT_8_OVER_PI))
            for i in range(0, size, 8):
                g = load(flat, gate + i)
                power = mul(factor, fma(mul(mul(g, g), cubic), g, g))
                activated = div(g, add(one, exp(power)))
                store(flat_out, at + i, mul(activated, load(flat, up + i)))


@inner
def cap(x, limit):
    """Each lane as limit · tanh(x / limit)."""
    return mul(limit, tanh(div(x, limit)))


@kernel
def softcap(x, limit, num_threads):
    """X = limit · tanh(x / limit), in place; [N, V] float32, V at least 8."""
    num_rows, size = x.shape
    flat = x.reshape(-1)
    limits = splat(limit)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            at = row * size
            # The last vector of a row may overlap the one before it: read it while that is still as it was.
            last = cap(load(flat, at + size - 8), limits)
            for i in range(at, at + size - 7, 8):
                store(flat, i, cap(load(flat, i), limits))
            store(flat, at + size - 8, last)


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


@kernel
def rotate_and_store(qkv, cos, sin, slot_mapping, keys, values, num_heads, num_threads):
    """Rotary embedding of queries (in place) and keys; keys and values go into their KV slots.

    Args:
        qkv: [N, (H + 2·Hkv)·K] float32: queries, keys, values.
        cos, sin: [N, rotary / 2] float32, the row's angles.
        slot_mapping: [N] int64; slot s is position s % block_size of block s // block_size.
        keys: [num_blocks, Hkv, K, block_size], values: [num_blocks, Hkv, block_size, K]; float32 or
            bfloat16 as uint16. Keys lie transposed, so that scores of a block's positions are lanes.
        num_heads: H.
    """
    num_rows, width = qkv.shape
    num_kv_heads, head_dim, block_size = keys.shape[1:]
    half = cos.shape[1]
    flat = qkv.reshape(-1)
    flat_cos = cos.reshape(-1)
    flat_sin = sin.reshape(-1)
    flat_keys = keys.reshape(-1)
    flat_values = values.reshape(-1)
    for thread in prange(num_threads):
        for row in range(thread, num_rows, num_threads):
            start = row * width
            for head in range(num_heads + num_kv_heads):
                rotate(flat, start + head * head_dim, flat_cos, flat_sin, row * half, half)
            block = slot_mapping[row] // block_size
            offset = slot_mapping[row] - block * block_size
            for head in range(num_kv_heads):
                source = start + (num_heads + head) * head_dim
                target = (block * num_kv_heads + head) * head_dim * block_size
                for i in range(head_dim):
                    store_scalar(flat_keys, target + i * block_size + offset, flat[source + i])
                source += num_kv_heads * head_dim
                target += offset * head_dim
                for i in range(0, head_dim, 8):
                    store(flat_values, target + i, load(flat, source + i))
