"""Keys and values as int8 in the cache: how a head is written, and what its scale is multiplied with.

A score is ``(q · k) · scale``, and a cell's weight takes the scale of its values along: the products themselves read
int8 like any other dtype. For the equation see ``backends.int8``.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic
from numba.extending import overload

from manyhats.engine.backends.cpu import simd
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.simd import (
    fma,
    load,
    max_lanes,
    maximum,
    mul,
    splat,
    store,
    store_apart,
    sub,
    sum_lanes,
    zero,
)
from manyhats.engine.backends.int8 import LARGEST

_F32 = ir.FloatType()


@intrinsic
def to_int8(typingctx, value):
    """The nearest integer of at most 127, to even where two are; NaN is 0."""

    def codegen(context, builder, signature, args):
        value = simd.call_llvm(builder, "llvm.nearbyint.f32", _F32, [args[0]])
        for order, bound in (("<", -LARGEST), (">", LARGEST)):
            limit = ir.Constant(_F32, float(bound))
            value = builder.select(builder.fcmp_ordered(order, value, limit), limit, value)
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.fptosi(builder.select(is_nan, ir.Constant(_F32, 0.0), value), ir.IntType(8))

    return types.int8(types.float32), codegen


def store_head(out, at, step, x, source, size, scales, scale_at):
    """A head's keys or values into a cell: out[at + i · step] = x[source + i], in out's dtype."""
    raise TypeError("runs only inside a kernel")


@inner
def store_rounded(out, at, step, x, source, size, scales, scale_at):
    """As float32 or bfloat16."""
    if step == 1:
        for i in range(0, size, 8):
            store(out, at + i, load(x, source + i))
    else:
        for i in range(0, size, 8):
            store_apart(out, at + i * step, step, load(x, source + i))


@inner
def store_quantized(out, at, step, x, source, size, scales, scale_at):
    """As int8, and the scale into scales[scale_at]; what is not finite makes the scale NaN."""
    top, nothing = zero(), zero()
    for i in range(0, size, 8):
        v = load(x, source + i)
        top = maximum(maximum(v, sub(zero(), v)), top)
        nothing = fma(v, zero(), nothing)
    scale = max_lanes(top) / np.float32(LARGEST) + sum_lanes(nothing)
    scales[scale_at] = scale
    divisor = scale if scale > 0.0 else np.float32(1.0)
    for i in range(size):
        out[at + i * step] = to_int8(x[source + i] / divisor)


@overload(store_head)
def _store_head(out, at, step, x, source, size, scales, scale_at):
    return (store_quantized if out.dtype == types.int8 else store_rounded).py_func


def scale_keys(keys, at, head_dim, block_size, scales, scale_at, factors, factors_at):
    """A head's keys in a block, [K, block_size] at ``at``, each cell's times its factor."""
    raise TypeError("runs only inside a kernel")


@inner
def scale_keys_rounded(keys, at, head_dim, block_size, scales, scale_at, factors, factors_at):
    """As float32 or bfloat16."""
    for start in range(at, at + head_dim * block_size, block_size):
        for i in range(0, block_size, 8):
            store(keys, start + i, mul(load(keys, start + i), load(factors, factors_at + i)))


@inner
def scale_keys_quantized(keys, at, head_dim, block_size, scales, scale_at, factors, factors_at):
    """Of int8 the scales."""
    for i in range(block_size):
        scales[scale_at + i] *= factors[factors_at + i]


@overload(scale_keys)
def _scale_keys(keys, at, head_dim, block_size, scales, scale_at, factors, factors_at):
    return (scale_keys_quantized if keys.dtype == types.int8 else scale_keys_rounded).py_func


def scale_values(values, at, head_dim, count, scales, scale_at, factor):
    """A head's values in the first cells of a block, [count, K] at ``at``, times a factor."""
    raise TypeError("runs only inside a kernel")


@inner
def scale_values_rounded(values, at, head_dim, count, scales, scale_at, factor):
    """As float32 or bfloat16."""
    factors = splat(factor)
    for i in range(at, at + count * head_dim, 8):
        store(values, i, mul(load(values, i), factors))


@inner
def scale_values_quantized(values, at, head_dim, count, scales, scale_at, factor):
    """Of int8 the scales."""
    for i in range(scale_at, scale_at + count):
        scales[i] *= factor


@overload(scale_values)
def _scale_values(values, at, head_dim, count, scales, scale_at, factor):
    return (scale_values_quantized if values.dtype == types.int8 else scale_values_rounded).py_func


def scale_cells(cached, w, at, stride, rows, first, last, scales, blocks, block_size):
    """w[i, first : last] of some rows, times the scale of each cell; for other dtypes than int8 nothing.

    Args:
        cached: keys or values.
        w: row i begins at ``at + i · stride``.
        scales: of the cells; see ``products`` for ``blocks``.
    """
    raise TypeError("runs only inside a kernel")


@inner
def scale_by_cell(cached, w, at, stride, rows, first, last, scales, blocks, block_size):
    """For int8."""
    table, entry, factor, offset = blocks
    for cell in range(first, last, 8):
        block = cell // block_size
        scale = load(scales, table[entry + block] * factor + offset + cell - block * block_size)
        for place in range(at + cell, at + cell + rows * stride, stride):
            store(w, place, mul(load(w, place), scale))


@inner
def scale_by_nothing(cached, w, at, stride, rows, first, last, scales, blocks, block_size):
    """For other dtypes."""


@overload(scale_cells)
def _scale_cells(cached, w, at, stride, rows, first, last, scales, blocks, block_size):
    return (scale_by_cell if cached.dtype == types.int8 else scale_by_nothing).py_func
