"""The low-rank delta of one row, of any rank.

Distinct adapters cost what reading them costs, so an adapter's matrices lie in one buffer of its own in the order
in which they are read (``packing.pack_rows``, ``pack_columns``), and are prefetched.
"""

from __future__ import annotations

from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.simd import (
    fma,
    load,
    load_address,
    prefetch,
    splat,
    store,
    sum_lanes,
    zero,
)

AHEAD = 4096
"""Bytes between what is read and what is prefetched."""


@inner
def shrink_1x4(x, x0, size, a, like, t, at):
    """t[at : at + 4] = x Aᵀ for one row of x and four rows of A, eight values of each in turn at ``a``."""
    s0 = s1 = s2 = s3 = zero()
    width = 8 * like.itemsize
    for i in range(0, size, 8):
        prefetch(a + AHEAD)
        v = load(x, x0 + i)
        s0 = fma(v, load_address(a, like), s0)
        s1 = fma(v, load_address(a + width, like), s1)
        s2 = fma(v, load_address(a + 2 * width, like), s2)
        s3 = fma(v, load_address(a + 3 * width, like), s3)
        a += 4 * width
    t[at] = sum_lanes(s0)
    t[at + 1] = sum_lanes(s1)
    t[at + 2] = sum_lanes(s2)
    t[at + 3] = sum_lanes(s3)


@inner
def shrink_1x1(x, x0, size, a, like, t, at):
    """t[at] = x · A for one row of each; the same arithmetic as in ``shrink_1x4``."""
    s0 = zero()
    for i in range(0, size, 8):
        s0 = fma(load(x, x0 + i), load_address(a, like), s0)
        a += 8 * like.itemsize
    t[at] = sum_lanes(s0)


@inner
def shrink(x, x0, size, a, rank, like, t, at):
    """t[at : at + rank] = x Aᵀ for one row of x."""
    step = size * like.itemsize
    r = 0
    while r < rank:
        if rank - r >= 4:
            shrink_1x4(x, x0, size, a + r * step, like, t, at + r)
            r += 4
        else:
            shrink_1x1(x, x0, size, a + r * step, like, t, at + r)
            r += 1


@inner
def expand_32(t, at, rank, b, like, scale, y, y0):
    """y[y0 : y0 + 32] += scale · t B for one row of t and 32 columns of B, [R, 32] at ``b``."""
    s0 = s1 = s2 = s3 = zero()
    width = 8 * like.itemsize
    for r in range(rank):
        prefetch(b + AHEAD)
        v = splat(t[at + r])
        s0 = fma(v, load_address(b, like), s0)
        s1 = fma(v, load_address(b + width, like), s1)
        s2 = fma(v, load_address(b + 2 * width, like), s2)
        s3 = fma(v, load_address(b + 3 * width, like), s3)
        b += 4 * width
    store(y, y0, fma(s0, scale, load(y, y0)))
    store(y, y0 + 8, fma(s1, scale, load(y, y0 + 8)))
    store(y, y0 + 16, fma(s2, scale, load(y, y0 + 16)))
    store(y, y0 + 24, fma(s3, scale, load(y, y0 + 24)))


@inner
def expand_8(t, at, rank, b, like, scale, y, y0):
    """y[y0 : y0 + 8] += scale · t B for eight columns of B; the same arithmetic as in ``expand_32``."""
    s0 = zero()
    for r in range(rank):
        s0 = fma(splat(t[at + r]), load_address(b, like), s0)
        b += 8 * like.itemsize
    store(y, y0, fma(s0, scale, load(y, y0)))


@inner
def expand(t, at, rank, b, size, like, scale, y, y0):
    """y[y0 : y0 + size] += scale · t B for one row of t."""
    step = rank * like.itemsize
    scales = splat(scale)
    i = 0
    while i < size:
        if size - i >= 32:
            expand_32(t, at, rank, b + i * step, like, scales, y, y0 + i)
            i += 32
        else:
            expand_8(t, at, rank, b + i * step, like, scales, y, y0 + i)
            i += 8
