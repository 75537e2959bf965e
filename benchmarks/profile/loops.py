"""Kernels that do nothing but read, or multiply."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu import simd, wide
from manyhats.engine.backends.cpu.compile import kernel
from manyhats.engine.backends.cpu.int16.instructions import HAS_WIDE, I32, WORDS, add_products, splat

CHAINS = 12
"""Independent sums of a thread, more than a processor's latency times its multipliers."""
INTEGER_CHAINS = 12 if HAS_WIDE else 6
"""The same for integers, as many as fit the registers."""


@kernel
def read(values, sums, num_threads):
    """Each thread sums its part of values, whose size is a multiple of 32 · num_threads."""
    size = values.shape[0] // num_threads
    for thread in prange(num_threads):
        s0 = s1 = s2 = s3 = simd.zero()
        for i in range(thread * size, (thread + 1) * size, 32):
            s0 = simd.add(s0, simd.load(values, i))
            s1 = simd.add(s1, simd.load(values, i + 8))
            s2 = simd.add(s2, simd.load(values, i + 16))
            s3 = simd.add(s3, simd.load(values, i + 24))
        sums[thread] = simd.sum_lanes(simd.add(simd.add(s0, s1), simd.add(s2, s3)))


@kernel
def multiply(start, sums, count, num_threads):
    """Each thread computes ``s = s · a + a`` count times in each lane of twelve registers.

    Args:
        start: [12 · lanes], what they begin with; the first is a, too.
        sums: [num_threads], of all lanes of a thread.
        count: of each.
        num_threads: to use.
    """
    for thread in prange(num_threads):
        a = wide.load(start, 0)
        s0, s1, s2 = a, wide.load(start, wide.LANES), wide.load(start, 2 * wide.LANES)
        s3, s4, s5 = (
            wide.load(start, 3 * wide.LANES),
            wide.load(start, 4 * wide.LANES),
            wide.load(start, 5 * wide.LANES),
        )
        s6, s7, s8 = (
            wide.load(start, 6 * wide.LANES),
            wide.load(start, 7 * wide.LANES),
            wide.load(start, 8 * wide.LANES),
        )
        s9, s10, s11 = (
            wide.load(start, 9 * wide.LANES),
            wide.load(start, 10 * wide.LANES),
            wide.load(start, 11 * wide.LANES),
        )
        for _ in range(count):
            s0, s1, s2 = simd.fma(s0, a, a), simd.fma(s1, a, a), simd.fma(s2, a, a)
            s3, s4, s5 = simd.fma(s3, a, a), simd.fma(s4, a, a), simd.fma(s5, a, a)
            s6, s7, s8 = simd.fma(s6, a, a), simd.fma(s7, a, a), simd.fma(s8, a, a)
            s9, s10, s11 = simd.fma(s9, a, a), simd.fma(s10, a, a), simd.fma(s11, a, a)
        total = np.float32(0.0)
        for s in (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11):
            total += simd.sum_lanes(s)
        sums[thread] = total


@intrinsic
def _integer_sums(typingctx, count):
    """``s = s + s₀ · a₀ + s₁ · a₁`` of pairs, count times in each lane of each chain; a lane of their sum."""

    def codegen(context, builder, signature, args):
        pairs = splat(WORDS, 0x10003)
        chains = [
            cgutils.alloca_once_value(builder, splat(WORDS, each + 1)) for each in range(INTEGER_CHAINS)
        ]
        with cgutils.for_range(builder, args[0]):
            for chain in chains:
                value = builder.load(chain)
                builder.store(add_products(builder, value, value, pairs), chain)
        total = splat(WORDS, 0)
        for chain in chains:
            total = builder.add(total, builder.load(chain))
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.int32(types.int64), codegen


@kernel
def multiply_integers(sums, count, num_threads):
    """Each thread multiplies pairs of 16-bit integers.

    Args:
        sums: [num_threads] int32, of a lane of each.
        count: of each chain.
        num_threads: to use.
    """
    for thread in prange(num_threads):
        sums[thread] = _integer_sums(count)
