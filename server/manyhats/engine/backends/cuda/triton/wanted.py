"""Where kernels find what is wanted from a step's logits, and where they leave it.

Both lie in one buffer of bytes each, ``wants`` and ``found``, so that one copy brings either. ``wants`` begins with a
header of int64: counts, and the places of the fields of both in bytes. So their sizes are data: what is launched is the
same for every step.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_ROWS = tl.constexpr(0)
"""M, rows of logits that count."""
NUM_CHOICES = tl.constexpr(1)
"""S."""
NUM_PAIRS = tl.constexpr(2)
"""P, log-probabilities."""
NUM_WORDS = tl.constexpr(3)
"""⌈V / 32⌉, of a mask."""
INTS = tl.constexpr(4)
"""[S, 8] int32: row, top_k, first and last edit, mask, whether the row is changed; two are spare."""
NUMBERS = tl.constexpr(5)
"""[S, 8] float64: temperature, top_p, log min_p, typical_p, point, repetition, presence, frequency penalty."""
EDIT_IDS = tl.constexpr(6)
"""[E] int32."""
EDIT_BIAS = tl.constexpr(7)
"""[E] float32."""
EDIT_USES = tl.constexpr(8)
"""[E] int32: twice the count, and 1 if the token is seen."""
MASKS = tl.constexpr(9)
"""[K, ⌈V / 32⌉] int32."""
PAIRS = tl.constexpr(10)
"""[P, 4] int32: row, token, how many of the most likely, and the place of the first of these. Token −1 − i is the one
that is chosen for choice i."""
TOKENS = tl.constexpr(11)
"""Found: [S] int32."""
RANKS = tl.constexpr(12)
"""Found: [P] int32; 0 where there was no token."""
LOGPROBS = tl.constexpr(13)
"""Found: [P] float64."""
TOP_IDS = tl.constexpr(14)
"""Found: [Σ k] int32."""
TOP_LOGPROBS = tl.constexpr(15)
"""Found: [Σ k] float64."""
BAD = tl.constexpr(16)
"""Found: [M, parts] int8, 1 where a part of a row is not finite."""
HEADER = tl.constexpr(17)
"""Its size."""


@triton.jit
def word(wants, index):
    """A word of the header."""
    return tl.load(wants.to(tl.pointer_type(tl.int64)) + index)


@triton.jit
def int32s(buffer, wants, index):
    """A field of int32 in a buffer."""
    return (buffer + word(wants, index)).to(tl.pointer_type(tl.int32))


@triton.jit
def float32s(buffer, wants, index):
    """A field of float32 in a buffer."""
    return (buffer + word(wants, index)).to(tl.pointer_type(tl.float32))


@triton.jit
def float64s(buffer, wants, index):
    """A field of float64 in a buffer."""
    return (buffer + word(wants, index)).to(tl.pointer_type(tl.float64))


@triton.jit
def finite(values):
    """The values, 0 for a NaN or an infinity."""
    return tl.where(tl.abs(values) < float("inf"), values, 0.0)
