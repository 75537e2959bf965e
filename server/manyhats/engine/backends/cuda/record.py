"""A slot's record: 64-bit words that say where an adapter's numbers lie and what is done with them.

One row of words for each slot lies on the device; a row of zeros is a slot where nothing acts. A word is an address, an
integer, or a float32 in its lower half. What acts at one place has the words of one of these classes.

A gate's word is the address of its weight [d_in] and then its bias, float32; 0 for none.
"""

from __future__ import annotations

from enum import IntEnum


class LinearWord(IntEnum):
    """Of one linear: ``y = y · factors + offsets + scale · (x Aᵀ) B``; A [R, d_in] and B [R, d_out] bfloat16.

    Factors and offsets [d_out] float32 or 0. Rows of matrices begin at multiples of ``ROW_VALUES``. A gate multiplies
    the scale or, where the rank is 0, y. ``INPUT`` are factors [d_in] of this linear's input alone.
    """

    A = 0
    B = 1
    RANK = 2
    SCALE = 3
    FACTORS = 4
    OFFSETS = 5
    GATE = 6
    INPUT = 7


class BottleneckWord(IntEnum):
    """Of one place's bottleneck adapter; the first three are those of a linear, by which its input is shrunk.

    DOWN [b, D] and UP [b, D] are bfloat16, vectors float32; the norms' weights are 0 for none. The first FIRST rows of
    a text pass through it, and the last LAST ones; if it IS_SPLIT, those through its first half, these through the
    other.
    """

    DOWN = 0
    UP = 1
    SIZE = 2
    DOWN_BIAS = 3
    UP_BIAS = 4
    SCALE = 5
    BEFORE_WEIGHT = 6
    BEFORE_BIAS = 7
    BEFORE_EPS = 8
    AFTER_WEIGHT = 9
    AFTER_BIAS = 10
    AFTER_EPS = 11
    ACTIVATION = 12
    INPUT = 13
    NORM_RESIDUAL = 14
    SKIPS_NORM = 15
    KEEP = 16
    CARRY = 17
    CARRY_NORMED = 18
    GATE = 19
    FIRST = 20
    LAST = 21
    IS_SPLIT = 22


class PrefixWord(IntEnum):
    """Of one layer's KV prefix: the gates of its keys and of its values."""

    KEYS = 0
    VALUES = 1


class ExpertWord(IntEnum):
    """Of one linear of one expert, as in ``LinearWord``, in a table [E, 3] of the adapter's own.

    A layer's record has the table's address, or 0; addresses in the table count from it.
    """

    A = 0
    B = 1
    RANK = 2
    SCALE = 3


class EmbeddingWord(IntEnum):
    """Of the embedding: A [V, R] and B [R, E], and own rows [n, E] of sorted ids [n] int32."""

    A = 0
    B = 1
    RANK = 2
    SCALE = 3
    NUM_TOKENS = 4
    IDS = 5
    ROWS = 6
    NUM_ROWS = 7


class HeadWord(IntEnum):
    """Of rows of an output head: matrix [n, E] bfloat16, ids [n] int32 or 0 for 0 … n − 1, bias [n] float32 or 0."""

    ROWS = 0
    IDS = 1
    BIAS = 2
    NUM_ROWS = 3


class Source(IntEnum):
    """What a bottleneck reads, or adds before its norm: values of INPUT and NORM_RESIDUAL."""

    NOTHING = 0
    OUTPUT = 1
    SUM = 2
    RESIDUAL = 3
    NORMED = 4


class StreamNorm(IntEnum):
    """The norm of the stream behind a sub-layer."""

    NONE = 0
    RMS = 1
    LAYER = 2


MAX_MEMBERS = 3
"""Linears of a group that the kernels take side by side."""
GATES = MAX_MEMBERS + len(PrefixWord)
"""Of a row at one place: those of linears side by side, and of a KV prefix."""
EXPERT_MEMBERS = ("gate_proj", "up_proj", "down_proj")
"""The linears of an expert in the order of its entries."""
EVERY_ROW = 1 << 30
"""FIRST of a bottleneck that all rows of a text pass through."""

ROW_VALUES = 64
"""Rows of matrices are padded with zeros to whole multiples, so that they can be read sixteen bytes at a time."""

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
"""The activations that the kernels know; a record holds the index."""
