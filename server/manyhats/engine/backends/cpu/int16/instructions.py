"""Integer instructions of x86 processors, the widest that this one has; elsewhere, others that compute the same.

One multiplies pairs of 16-bit integers and adds them up in 32 bits, the other looks up bytes in a table of sixteen.
Sums of integers are exact, so all of them give the same bits. Those for other processors are slow, and there so that
every processor can test the kernels.

Vectors have sixteen 32-bit lanes: one register, or two of half the width. A lane may hold a pair of 16-bit integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from manyhats.engine.backends.cpu.packing import CODE_STEPS, GROUP_ROWS
from manyhats.engine.backends.cpu.simd import NF4_VALUES, call_llvm, has_feature

LANES = GROUP_ROWS

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
SHORTS = ir.VectorType(I16, LANES)
WORDS = ir.VectorType(I32, LANES)
_HALVES = ir.VectorType(I16, 2 * LANES)
_BYTES = ir.VectorType(I8, 4 * LANES)

INPUT_STEPS = 2**13 - 1
"""Of a block of inputs, in each direction. 64 · INPUT_STEPS · CODE_STEPS < 2³¹, and int8 has fewer steps."""

HAS_WIDE = has_feature("avx512bw")
"""Whether a vector of sixteen lanes is one register."""
_HAS_AVX2 = has_feature("avx2")
_HAS_DOT = has_feature("avx512vnni") and HAS_WIDE
_HAS_HALF_DOT = has_feature("avxvnni")


def has_instructions() -> bool:
    """Whether this processor has them, so that kernels made of them are fast."""
    return _HAS_AVX2


def instructions_used() -> str:
    """Which of them the kernels are made of, for people."""
    if _HAS_DOT:
        return "AVX512-VNNI"
    if _HAS_HALF_DOT:
        return "AVX-VNNI"
    return "AVX512-BW" if HAS_WIDE else "AVX2"


def splat(kind: Any, value: Any) -> ir.Constant:
    """The same number in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Lane-wise a · b + c in float32, rounded once."""
    return call_llvm(builder, f"llvm.fma.v{LANES}f32", FLOATS, [a, b, c])


def add_products(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a₀ · b₀ + a₁ · b₁ in each lane, of pairs of 16-bit integers."""
    if _HAS_DOT:
        return call_llvm(builder, "llvm.x86.avx512.vpdpwssd.512", WORDS, [total, a, b])
    if _HAS_HALF_DOT:
        halves = zip(*(_parts(builder, value, 2) for value in (total, a, b)), strict=True)
        name, kind = "llvm.x86.avx512.vpdpwssd.256", ir.VectorType(I32, LANES // 2)
        return _join(builder, [call_llvm(builder, name, kind, list(half)) for half in halves])
    a, b = builder.bitcast(a, _HALVES), builder.bitcast(b, _HALVES)
    if HAS_WIDE:
        products = call_llvm(builder, "llvm.x86.avx512.pmaddw.d.512", WORDS, [a, b])
    elif _HAS_AVX2:
        halves = zip(_parts(builder, a, 2), _parts(builder, b, 2), strict=True)
        name, kind = "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, LANES // 2)
        products = _join(builder, [call_llvm(builder, name, kind, list(half)) for half in halves])
    else:
        wide = ir.VectorType(I32, 2 * LANES)
        each = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
        products = builder.add(*(_every(builder, each, first, 2) for first in (0, 1)))
    return builder.add(total, products)


@dataclass(frozen=True, slots=True)
class Codes:
    """How weights of eight inputs, an *octet*, lie in each lane.

    Attributes:
        num_words: 32-bit words of an octet.
        decode: the words' vectors → four vectors with a pair of the octet's 16-bit values in each lane.
    """

    num_words: int
    decode: Callable[[Any, list[Any]], list[Any]]


def _decode_nf4(builder: Any, words: list[Any]) -> list[Any]:
    """The NF4 values, in steps.

    The sixteen bytes of four lanes belong to the same four lanes of the results. A byte's low code is an input of the
    first two results, its high code of the others; the first eight bytes are pairs of one result, the last eight of
    the next.
    """
    low = builder.and_(words[0], splat(WORDS, 0x0F0F0F0F))
    high = builder.and_(builder.lshr(words[0], splat(WORDS, 4)), splat(WORDS, 0x0F0F0F0F))
    pairs = []
    for codes in (low, high):
        lower, upper = (_look_up(builder, table, builder.bitcast(codes, _BYTES)) for table in _TABLES)
        for half in (0, 8):
            places = [
                16 * quarter + half + i + 4 * LANES * j
                for quarter in range(4)
                for i in range(8)
                for j in (0, 1)
            ]
            mask = ir.Constant(ir.VectorType(I32, 4 * LANES), places)
            pairs.append(builder.bitcast(builder.shuffle_vector(lower, upper, mask), WORDS))
    return pairs


def _decode_int8(builder: Any, words: list[Any]) -> list[Any]:
    """The low bytes of a word's two halves are a pair, and the high ones the next."""
    pairs = []
    eight = splat(_HALVES, 8)
    for word in words:
        halves = builder.bitcast(word, _HALVES)
        for half in (builder.shl(halves, eight), halves):
            pairs.append(builder.bitcast(builder.ashr(half, eight), WORDS))
    return pairs


NF4, INT8 = Codes(1, _decode_nf4), Codes(2, _decode_int8)


def _look_up(builder: Any, table: list[int], indices: Any) -> Any:
    """table[index] of each byte; indices are under sixteen."""
    if HAS_WIDE:
        name, count = "llvm.x86.avx512.pshuf.b.512", 1
    elif _HAS_AVX2:
        name, count = "llvm.x86.avx2.pshuf.b", 2
    else:
        return _chosen(builder, table, indices)
    kind = ir.VectorType(I8, 4 * LANES // count)
    tables = ir.Constant(kind, table * (kind.count // 16))
    return _join(
        builder, [call_llvm(builder, name, kind, [tables, part]) for part in _parts(builder, indices, count)]
    )


def _chosen(builder: Any, table: list[int], indices: Any) -> Any:
    """What ``_look_up`` says, by one comparison for each entry of the table."""
    result = splat(_BYTES, 0)
    for index, value in enumerate(table):
        is_it = builder.icmp_signed("==", indices, splat(_BYTES, index))
        result = builder.select(is_it, splat(_BYTES, value), result)
    return result


def _parts(builder: Any, value: Any, count: int) -> list[Any]:
    """A vector's halves, or the vector itself."""
    size = value.type.count // count
    return [_every(builder, value, first * size, 1, size) for first in range(count)]


def _every(builder: Any, value: Any, first: int, step: int, count: int | None = None) -> Any:
    """Some elements of a vector."""
    count = count or value.type.count // step
    mask = ir.Constant(ir.VectorType(I32, count), [first + step * index for index in range(count)])
    return builder.shuffle_vector(value, value, mask)


def _join(builder: Any, parts: list[Any]) -> Any:
    """A vector of one or two parts."""
    if len(parts) == 1:
        return parts[0]
    count = 2 * parts[0].type.count
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, count), list(range(count))))


def _tables() -> list[list[int]]:
    """The lower and the upper bytes of NF4's values in steps."""
    steps = np.rint(NF4_VALUES.astype(np.float64) * CODE_STEPS).astype(np.int16)
    return [(steps & 255).tolist(), (steps >> 8 & 255).tolist()]


_TABLES = _tables()
