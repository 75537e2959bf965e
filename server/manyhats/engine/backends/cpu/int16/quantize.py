"""Rows of inputs as 16-bit integers."""

from __future__ import annotations

import struct

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.int16.instructions import (
    FLOATS,
    I32,
    INPUT_STEPS,
    LANES,
    SHORTS,
    WORDS,
    fma,
    splat,
)
from manyhats.engine.backends.cpu.simd import element, spread, tree
from manyhats.engine.model.nf4 import BLOCK_SIZE

_VECTORS = BLOCK_SIZE // LANES
_MAGIC = 1.5 * 2.0**23
"""Added to a small number, its lowest bits are the nearest integer's, ties to even."""
_LEAST = struct.unpack("<i", struct.pack("<f", 1e-30))[0]
"""The bits of the least size that a block is taken to have, so that its inverse is finite."""


@intrinsic
def quantize_block(typingctx, x, at, out, out_at, step_at):
    """Integers of x[at : at + 64] as pairs in out[out_at : out_at + 32], and their step at out[step_at].

    The step is that of the largest; NaN or infinite where that is.
    """

    def codegen(context, builder, signature, args):
        b = builder
        source = element(context, b, signature.args[0], args[0], args[1])
        source = b.bitcast(source, FLOATS.as_pointer())
        values = [b.load(b.gep(source, [ir.Constant(I32, i)]), align=4) for i in range(_VECTORS)]
        target = element(context, b, signature.args[2], args[2], args[3])
        step = b.fdiv(_largest(b, values), ir.Constant(ir.FloatType(), float(INPUT_STEPS)))
        inverse = spread(b, b.fdiv(ir.Constant(ir.FloatType(), 1.0), step), LANES)
        target = b.bitcast(target, SHORTS.as_pointer())
        for i, value in enumerate(values):
            bits = b.bitcast(fma(b, value, inverse, splat(FLOATS, _MAGIC)), WORDS)
            b.store(b.trunc(bits, SHORTS), b.gep(target, [ir.Constant(I32, i)]), align=4)
        place = element(context, b, signature.args[2], args[2], args[4])
        b.store(b.bitcast(step, I32), place)
        return context.get_dummy_value()

    return types.void(x, types.int64, out, types.int64, types.int64), codegen


def _largest(b, values):
    """The largest size of any lane. As integers, the bits of sizes are in their order, with NaN above all."""

    def larger(x, y):
        return b.select(b.icmp_signed(">", x, y), x, y)

    largest = splat(WORDS, _LEAST)
    for value in values:
        largest = larger(largest, b.and_(b.bitcast(value, WORDS), splat(WORDS, 0x7FFFFFFF)))
    return b.bitcast(tree(b, largest, larger, LANES), ir.FloatType())


@inner
def quantize_row(x, at, size, out, row):
    """x[at : at + size] as a row of ``out``, as ``tile`` reads them: integers, then steps."""
    out_at = row * (size // 2 + size // BLOCK_SIZE)
    steps = out_at + size // 2
    for block in range(size // BLOCK_SIZE):
        first = block * BLOCK_SIZE
        quantize_block(x, at + first, out, out_at + first // 2, steps + block)
