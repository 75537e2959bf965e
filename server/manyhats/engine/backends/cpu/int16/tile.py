"""Tiles of the product of rows of 16-bit integers and weights in codes, unrolled in registers.

Sixteen output rows, a *group*, are the lanes; ``instructions.Codes`` says how codes lie.

A row of inputs is integers q, then a step s for each block of 64 of them: x = s · q. Of each output, a block's products
are summed exactly, in integers; the weights' scale times the block's step times that sum is added to the output's. The
blocks are in the same order in every tile, so an output does not depend on the tile that it is in.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu.int16.instructions import (
    FLOATS,
    I64,
    LANES,
    SHORTS,
    WORDS,
    Codes,
    add_products,
    fma,
    splat,
)
from manyhats.engine.backends.cpu.memory import Memory
from manyhats.engine.model.nf4 import BLOCK_SIZE

OCTET = 8
"""Inputs whose codes are decoded at a time."""
PAIRS = OCTET // 2
_OCTETS_OF_BLOCK = BLOCK_SIZE // OCTET
_CHAINS = 4
"""Sums that a tile of few rows has."""


def _integer(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class _Tile:
    """A tile's instructions, whose operands are the arguments of ``make_tile``'s intrinsic."""

    def __init__(
        self, builder: Any, codes: Codes, arrays: tuple[Memory, ...], numbers: tuple[Any, ...]
    ) -> None:
        self._builder = builder
        self._codes = codes
        self._weights, self._packed, self._scales, self._units, self._bias, self._x, self._y = arrays
        self._at, self._ahead, self._group, self._row, self._num_rows, self._size, self._out = numbers

    def emit(self, num_rows: int, is_decoded: bool) -> None:
        """The loop over blocks, and the stores behind it."""
        b = self._builder
        totals = [cgutils.alloca_once_value(b, splat(FLOATS, 0.0)) for _ in range(num_rows)]
        rows = self._rows(num_rows)
        num_blocks = b.sdiv(self._size, _integer(BLOCK_SIZE))
        # Sums are exact, so a row may have several; the products of one must wait for each other.
        num_chains = max(1, _CHAINS // num_rows)
        sums = [[cgutils.alloca_once(b, WORDS) for _ in range(num_chains)] for _ in range(num_rows)]
        with cgutils.for_range(b, num_blocks) as loop:
            self._block(loop.index, num_blocks, rows, sums, is_decoded)
            scale = self._scale(loop.index, num_blocks)
            for row, chains, total in zip(rows, sums, totals, strict=True):
                in_row = b.add(b.mul(num_blocks, _integer(BLOCK_SIZE // 2)), loop.index)
                step = self._x.spread(b.add(self._start(row, num_blocks), in_row))
                factor = b.fmul(scale, b.bitcast(step, FLOATS))
                of_block = functools.reduce(b.add, [b.load(chain) for chain in chains])
                b.store(fma(b, b.sitofp(of_block, FLOATS), factor, b.load(total)), total)
        column = b.mul(self._group, _integer(LANES))
        unit, bias = self._units.load(column, FLOATS), self._bias.load(column, FLOATS)
        for row, total in zip(rows, totals, strict=True):
            self._y.store(b.add(b.mul(row, self._out), column), fma(b, b.load(total), unit, bias))

    def _rows(self, count: int) -> list[Any]:
        """The rows of the tile; past the end, the last one again."""
        b = self._builder
        last = b.sub(self._num_rows, _integer(1))
        rows = [b.add(self._row, _integer(offset)) for offset in range(count)]
        return [b.select(b.icmp_signed("<", row, last), row, last) for row in rows]

    def _start(self, row: Any, num_blocks: Any) -> Any:
        """Where a row of the inputs begins."""
        return self._builder.mul(row, self._builder.mul(num_blocks, _integer(BLOCK_SIZE // 2 + 1)))

    def _block(self, block: Any, num_blocks: Any, rows: list[Any], sums: Any, is_decoded: bool) -> None:
        """The sums of a block's products, for each row."""
        b = self._builder
        for chain in (chain for chains in sums for chain in chains):
            b.store(splat(WORDS, 0), chain)
        first = b.mul(block, _integer(_OCTETS_OF_BLOCK))
        in_block = b.mul(first, _integer(PAIRS))
        inputs = [b.add(self._start(row, num_blocks), in_block) for row in rows]
        with cgutils.for_range(b, _integer(_OCTETS_OF_BLOCK)) as loop:
            octet = b.add(first, loop.index)
            ahead = b.add(self._ahead, b.mul(octet, _integer(self._stride(is_decoded=False))))
            for word in range(self._codes.num_words):
                self._packed.ask_ahead(b.add(ahead, _integer(word * LANES)))
            values = self._values(
                b.add(self._at, b.mul(octet, _integer(self._stride(is_decoded)))), is_decoded
            )
            in_row = b.mul(loop.index, _integer(PAIRS))
            for pair, value in enumerate(values):
                for chains, at in zip(sums, inputs, strict=True):
                    x = self._x.spread(b.add(b.add(at, in_row), _integer(pair)))
                    chain = chains[pair % len(chains)]
                    b.store(add_products(b, b.load(chain), value, x), chain)

    def _stride(self, is_decoded: bool) -> int:
        """32-bit words of a group's octet."""
        return (PAIRS if is_decoded else self._codes.num_words) * LANES

    def _values(self, at: Any, is_decoded: bool) -> list[Any]:
        """The values of an octet, pair by pair."""
        vectors = _load_vectors(self._builder, self._weights, at, self._stride(is_decoded) // LANES)
        return vectors if is_decoded else self._codes.decode(self._builder, vectors)

    def _scale(self, block: Any, num_blocks: Any) -> Any:
        """The scales of a block, in units."""
        b = self._builder
        at = b.add(b.mul(self._group, num_blocks), block)
        raw = self._scales.load(b.mul(at, _integer(LANES)), SHORTS)
        return b.sitofp(b.sext(raw, WORDS), FLOATS)


def _load_vectors(builder: Any, memory: Memory, at: Any, count: int) -> list[Any]:
    return [memory.load(builder.add(at, _integer(index * LANES)), WORDS) for index in range(count)]


def make_tile(codes: Codes, num_rows: int, *, is_decoded: bool) -> Any:
    """A tile as an intrinsic.

    Args:
        codes: of the weights.
        num_rows: of the input.
        is_decoded: whether the weights are values already, a pair in each 32-bit lane, or packed codes.
    """

    @intrinsic
    def tile(
        typingctx,
        weights,
        packed,
        scales,
        units,
        bias,
        x,
        y,
        at,
        ahead,
        group,
        row,
        rows,
        size,
        out,
    ):
        """y[row …, group] = x Wᵀ + b.

        Args:
            weights: of ``size`` inputs, from ``at`` on; 32-bit words.
            packed: all codes.
            scales: [groups, size / 64, 16] int16, in units of the output row.
            units: [groups · 16] float32, of scales and of codes.
            bias: the same.
            x: [rows, size / 2 + size / 64], 32-bit pairs of integers, then float32 steps.
            y: [rows, out] float32.
            at: where the tile's weights begin.
            ahead: where as many codes begin that are read next: they are asked for meanwhile.
            group: of sixteen outputs.
            row: its first; past the last of all, that one is computed again.
            rows: of x and y.
            size: of a row of x, a multiple of 64.
            out: of a row of y.
        """

        def codegen(context, builder, signature, args):
            arrays = tuple(
                Memory(context, builder, kind, array)
                for kind, array in zip(signature.args[:7], args[:7], strict=True)
            )
            _Tile(builder, codes, arrays, tuple(args[7:])).emit(num_rows, is_decoded)
            return context.get_dummy_value()

        return types.void(weights, packed, scales, units, bias, x, y, *[types.int64] * 7), codegen

    return tile


def make_decoder(codes: Codes) -> Any:
    """An intrinsic that decodes an octet of a group, as tiles read it."""

    @intrinsic
    def decode(typingctx, weights, at, panel, target):
        """panel[target : target + 64] = the values of the octet whose words begin at weights[at]."""

        def codegen(context, builder, signature, args):
            packed, values = (Memory(context, builder, signature.args[i], args[i]) for i in (0, 2))
            words = _load_vectors(builder, packed, args[1], codes.num_words)
            for pair, decoded in enumerate(codes.decode(builder, words)):
                values.store(builder.add(args[3], _integer(pair * LANES)), decoded)
            return context.get_dummy_value()

        return types.void(weights, types.int64, panel, types.int64), codegen

    return decode
