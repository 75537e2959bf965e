"""Low-rank deltas of several rows that have the same adapter, unrolled in registers.

Each value is made by the same operations in the same order as in ``low_rank``, so a row's bits are those that it has
alone. What is read of a matrix is used for all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu.adapters.low_rank import shrink_1x1
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.simd import LANES, call_llvm, element, load_lanes, spread, tree

TILE_ROWS = 8
"""Rows of a tile, at most."""
_WIDE = 2 * LANES
_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _part(builder: Any, value: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
    return builder.shuffle_vector(value, value, mask)


class _Rows:
    """A tile's rows, and its sums.

    Args:
        of_rows: the numbers of all rows, int32; the tile's begin at ``first``, and at ``last`` others begin.
        count: of the tile; past ``last``, the one before it is computed again.
    """

    def __init__(
        self, context: Any, builder: Any, of_rows: tuple[Any, Any], first: Any, last: Any, count: int
    ) -> None:
        self._context = context
        self._builder = b = builder
        end = b.sub(last, _integer(1))
        places = [b.add(first, _integer(index)) for index in range(count)]
        places = [b.select(b.icmp_signed("<", place, end), place, end) for place in places]
        pointers = [element(context, b, *of_rows, place) for place in places]
        self.numbers = [b.sext(b.load(pointer), _I64) for pointer in pointers]

    def sums(self, vectors: int, lanes: int) -> list[list[Any]]:
        """As many vectors of zeros for each row."""
        zeros = ir.Constant(ir.VectorType(_F32, lanes), [ir.Constant(_F32, 0.0)] * lanes)
        return [
            [cgutils.alloca_once_value(self._builder, zeros) for _ in range(vectors)] for _ in self.numbers
        ]

    def pointer(self, array: tuple[Any, Any], index: Any, lanes: int) -> Any:
        """A pointer to a vector in an array of float32."""
        found = element(self._context, self._builder, *array, index)
        return self._builder.bitcast(found, ir.VectorType(_F32, lanes).as_pointer())

    def matrix(self, address: Any, offset: Any, dtype: Any, vectors: int, lanes: int) -> list[Any]:
        """Vectors of a matrix, ``offset`` values behind an address."""
        b, item = self._builder, dtype.bitwidth // 8
        start = b.add(address, b.mul(offset, _integer(item)))
        places = [b.add(start, _integer(index * lanes * item)) for index in range(vectors)]
        return [load_lanes(b, b.inttoptr(place, _I8.as_pointer()), dtype, lanes) for place in places]

    def add(self, sums: list[Any], factor: Any, vectors: list[Any]) -> None:
        """``sums += factor · vectors``."""
        for slot, vector in zip(sums, vectors, strict=True):
            operands = [factor, vector, self._builder.load(slot)]
            name = f"llvm.fma.v{vector.type.count}f32"
            self._builder.store(call_llvm(self._builder, name, vector.type, operands), slot)


def _shrink_tile(num_rows: int) -> Any:
    """Four ranks of some rows: two ranks are the halves of a vector, with the row's eight values in both."""

    @intrinsic
    def tile(typingctx, x, rows, first, last, size, a, like, t, at, stride):
        def codegen(context, builder, signature, args):
            b = builder
            x, rows, first, last, size, a, _, t, at, stride = args
            x, t = (signature.args[0], x), (signature.args[7], t)
            tile = _Rows(context, b, (signature.args[1], rows), first, last, num_rows)
            sums = tile.sums(2, _WIDE)
            starts = [b.mul(number, size) for number in tile.numbers]
            with cgutils.for_range(b, b.sdiv(size, _integer(LANES))) as loop:
                offset = b.mul(loop.index, _integer(4 * LANES))
                vectors = tile.matrix(a, offset, signature.args[6].dtype, 2, _WIDE)
                for start, of_row in zip(starts, sums, strict=True):
                    place = b.add(start, b.mul(loop.index, _integer(LANES)))
                    values = b.load(tile.pointer(x, place, LANES), align=4)
                    tile.add(of_row, _part(b, values, [*range(LANES)] * 2), vectors)
            for index, of_row in enumerate(sums):
                place = b.add(at, b.mul(stride, _integer(index)))
                for rank in range(4):
                    half = [*range(LANES * (rank % 2), LANES * (rank % 2 + 1))]
                    total = tree(b, _part(b, b.load(of_row[rank // 2]), half), b.fadd)
                    b.store(total, element(context, b, *t, b.add(place, _integer(rank))))
            return context.get_dummy_value()

        long = types.int64
        return types.void(x, rows, long, long, long, long, like, t, long, long), codegen

    return tile


def _expand_tile(num_rows: int, vectors: int, lanes: int) -> Any:
    """Some columns of some rows."""

    @intrinsic
    def tile(typingctx, t, at, rank, b, like, scale, y, rows, first, last, out, column):
        def codegen(context, builder, signature, args):
            t, at, rank, address, _, scale, y, rows, first, last, out, column = args
            t, y = (signature.args[0], t), (signature.args[6], y)
            tile = _Rows(context, builder, (signature.args[7], rows), first, last, num_rows)
            sums = tile.sums(vectors, lanes)
            with cgutils.for_range(builder, rank) as loop:
                offset = builder.mul(loop.index, _integer(vectors * lanes))
                matrix = tile.matrix(address, offset, signature.args[4].dtype, vectors, lanes)
                for index, of_row in enumerate(sums):
                    place = builder.add(at, builder.add(builder.mul(rank, _integer(index)), loop.index))
                    factor = builder.load(element(context, builder, *t, place))
                    tile.add(of_row, spread(builder, factor, lanes), matrix)
            pointers = []
            for number, of_row in zip(tile.numbers, sums, strict=True):
                start = builder.add(builder.mul(number, out), column)
                for index, slot in enumerate(of_row):
                    place = builder.add(start, _integer(index * lanes))
                    pointers.append((tile.pointer(y, place, lanes), slot))
            # All are read before any is written, since a row may be there twice.
            before = [builder.load(pointer, align=4) for pointer, _ in pointers]
            for (pointer, slot), value in zip(pointers, before, strict=True):
                operands = [builder.load(slot), spread(builder, scale, lanes), value]
                changed = call_llvm(builder, f"llvm.fma.v{lanes}f32", value.type, operands)
                builder.store(changed, pointer, align=4)
            return context.get_dummy_value()

        long, floats = types.int64, types.float32
        return types.void(t, long, long, long, like, floats, y, rows, long, long, long, long), codegen

    return tile


_shrink_4, _shrink_8 = _shrink_tile(4), _shrink_tile(TILE_ROWS)
_expand_4x32, _expand_8x32 = _expand_tile(4, 2, _WIDE), _expand_tile(TILE_ROWS, 2, _WIDE)
_expand_4x8, _expand_8x8 = _expand_tile(4, 1, LANES), _expand_tile(TILE_ROWS, 1, LANES)


@inner
def shrink_rows(x, rows, first, last, size, a, rank, like, t, at):
    """t[at + i · rank : …] = x Aᵀ for the rows whose numbers are rows[first : last], of x [N, size].

    There are at most ``TILE_ROWS``; in t, a tile's rows past the last are the last again.
    """
    count = 4 if last - first <= 4 else TILE_ROWS
    for r in range(0, rank - 3, 4):
        if count == 4:
            _shrink_4(x, rows, first, last, size, a, like, t, at + r, rank)
        else:
            _shrink_8(x, rows, first, last, size, a, like, t, at + r, rank)
        a += 4 * size * like.itemsize
    for r in range(rank - rank % 4, rank):
        for index in range(count):
            row = np.int64(rows[min(first + index, last - 1)])
            shrink_1x1(x, row * size, size, a, like, t, at + index * rank + r)
        a += size * like.itemsize


@inner
def expand_rows(t, at, rank, b, size, like, scale, y, rows, first, last, out, start):
    """y[rows[first + i], start : start + size] += scale · t[at + i · rank : …] B, of y [N, out]."""
    step = rank * like.itemsize
    wide = size - size % 32
    for i in range(0, wide, 32):
        if last - first <= 4:
            _expand_4x32(t, at, rank, b + i * step, like, scale, y, rows, first, last, out, start + i)
        else:
            _expand_8x32(t, at, rank, b + i * step, like, scale, y, rows, first, last, out, start + i)
    for i in range(wide, size, 8):
        if last - first <= 4:
            _expand_4x8(t, at, rank, b + i * step, like, scale, y, rows, first, last, out, start + i)
        else:
            _expand_8x8(t, at, rank, b + i * step, like, scale, y, rows, first, last, out, start + i)
