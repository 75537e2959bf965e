"""Products of dense weights and inputs, sixteen outputs at a time, and inputs rounded to bfloat16.

A 32-bit lane holds a float32 weight, or a pair of bfloat16 weights of consecutive inputs. With AVX512-BF16 one
instruction adds the products of a pair of weights and a pair of inputs, both bfloat16, to a float32 sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from manyhats.engine.backends.cpu import simd
from manyhats.engine.backends.cpu.int16.instructions import FLOATS, I16, WORDS, fma, splat
from manyhats.engine.backends.cpu.packing import GROUP_ROWS
from manyhats.engine.backends.cpu.simd import call_llvm, has_feature

HAS_WIDE = has_feature("avx512f")
"""Whether a vector of sixteen lanes is one register."""
_HAS_PAIRS = has_feature("avx512bf16") and HAS_WIDE
_HALVES = ir.VectorType(I16, GROUP_ROWS)
_HIGH = -0x10000


def has_pairs() -> bool:
    """Whether this processor multiplies pairs of bfloat16, so that kernels made of that are fast."""
    return _HAS_PAIRS


@dataclass(frozen=True, slots=True)
class Form:
    """How a word of weights is multiplied.

    Attributes:
        decode: the words of sixteen outputs → what each of the next 32-bit words of inputs is multiplied with.
        add: total, one of these, and a word of inputs in every lane → their product added to the total.
        num_words: of inputs for each word of weights.
        num_inputs: that a word of weights is for.
    """

    decode: Callable[[Any, Any], list[Any]]
    add: Callable[[Any, Any, Any, Any], Any]
    num_words: int
    num_inputs: int


def _decode_floats(builder: Any, words: Any) -> list[Any]:
    return [builder.bitcast(words, FLOATS)]


def _decode_halves(builder: Any, words: Any) -> list[Any]:
    """Both weights of a pair as float32, exactly."""
    low, high = builder.shl(words, splat(WORDS, 16)), builder.and_(words, splat(WORDS, _HIGH))
    return [builder.bitcast(low, FLOATS), builder.bitcast(high, FLOATS)]


def _decode_pairs(builder: Any, words: Any) -> list[Any]:
    return [words]


def _add_floats(builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
    return fma(builder, weights, builder.bitcast(inputs, FLOATS), total)


def _add_pairs(builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
    """Other processors than those with the instruction may round the two sums otherwise."""
    if _HAS_PAIRS:
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [total, weights, inputs])
    for weight, value in zip(*(_decode_halves(builder, words) for words in (weights, inputs)), strict=True):
        total = fma(builder, weight, value, total)
    return total


FLOAT32 = Form(_decode_floats, _add_floats, num_words=1, num_inputs=1)
"""Weights and inputs in float32."""
WIDENED = Form(_decode_halves, _add_floats, num_words=2, num_inputs=2)
"""Weights in bfloat16, inputs in float32."""
PAIRS = Form(_decode_pairs, _add_pairs, num_words=1, num_inputs=2)
"""Both in bfloat16."""


def narrow(builder: Any, values: Any) -> Any:
    """Sixteen float32 as bfloat16 bits, to nearest even; NaN stays NaN."""
    if _HAS_PAIRS:
        return call_llvm(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _HALVES, [values])
    return simd.narrow(builder, values)
