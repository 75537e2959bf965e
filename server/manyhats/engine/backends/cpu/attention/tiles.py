"""The two products of attention, for a few query rows at a time: with keys, and with values.

Both are ``c[i, 0:16] = Σ_t a[i, t] · b[t, 0:16]``, where b lies in the cache. Each sum is one chain of fused
multiply-adds over t, from zero and in order, so that it is the same whatever rows and columns are computed beside it:
the shapes here only say how many chains run at once. Eight registers' worth hide the latency of a multiply-add,
twelve leave room for little else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu import simd

WIDTH = 16
"""Columns of a vector, on every processor: one, two or four registers."""

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_BYTE = ir.IntType(8)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(_F32, WIDTH)
IS_WIDE = simd.has_feature("avx512f")
_ITEM_BYTES = {types.float32: 4, types.uint16: 2, types.int8: 1}


def _load(builder: Any, pointer: Any, dtype: Any) -> Any:
    """Sixteen values at a byte pointer: float32, bfloat16 or int8."""
    if dtype == types.int8:
        raw = builder.load(builder.bitcast(pointer, ir.VectorType(_BYTE, WIDTH).as_pointer()), align=1)
        return builder.sitofp(builder.sext(raw, ir.VectorType(_I32, WIDTH)), _VEC)
    if dtype != types.uint16 or IS_WIDE:
        return simd.load_lanes(builder, pointer, dtype, WIDTH)
    # A shift and a mask instead of shuffles: the values with even numbers, then those with odd ones.
    half = ir.VectorType(_I32, WIDTH // 2)
    pairs = builder.load(builder.bitcast(pointer, half.as_pointer()), align=2)
    even = builder.shl(pairs, ir.Constant(half, [16] * (WIDTH // 2)))
    odd = builder.and_(pairs, ir.Constant(half, [-0x10000] * (WIDTH // 2)))
    both = builder.shuffle_vector(even, odd, _mask(range(WIDTH)))
    return builder.bitcast(both, _VEC)


def _reordered(builder: Any, value: Any, dtype: Any, back: bool) -> Any:
    """A vector of sums as ``_load`` orders values, or back in the order of memory."""
    if dtype != types.uint16 or IS_WIDE:
        return value
    half = WIDTH // 2
    if back:
        order = [half * (lane % 2) + lane // 2 for lane in range(WIDTH)]
    else:
        order = [*range(0, WIDTH, 2), *range(1, WIDTH, 2)]
    return builder.shuffle_vector(value, value, _mask(order))


def _mask(lanes: Iterable[int]) -> ir.Constant:
    order = list(lanes)
    return ir.Constant(ir.VectorType(_I32, len(order)), order)


_UNROLLED = 4


class _Product:
    """Emits ``sums[i, j] += a[i, t] · b[j][t]`` for some t, as LLVM instructions."""

    def __init__(self, context: Any, builder: Any, dtype: Any, rows: int, vectors: int) -> None:
        self._context = context
        self.builder = builder
        self._dtype = dtype
        self.item_bytes = _ITEM_BYTES[dtype]
        nothing = ir.Constant(_VEC, [ir.Constant(_F32, 0.0)] * WIDTH)
        self._sums = [
            [cgutils.alloca_once_value(builder, nothing) for _ in range(vectors)] for _ in range(rows)
        ]

    def int(self, value: int) -> Any:
        return ir.Constant(_I64, value)

    def pointer(self, array_type: Any, array: Any, index: Any) -> Any:
        """A byte pointer to array[index]."""
        found = simd.element(self._context, self.builder, array_type, array, index)
        return self.builder.bitcast(found, _BYTE.as_pointer())

    def rows(self, array_type: Any, array: Any, at: Any, stride: Any) -> list[Any]:
        """Pointers to each row of an array."""
        starts = [
            self.builder.add(at, self.builder.mul(stride, self.int(row))) for row in range(len(self._sums))
        ]
        return [simd.element(self._context, self.builder, array_type, array, start) for start in starts]

    def add(self, a: list[Any], b: list[Any], ahead: list[Any], stride: Any, count: Any, every: int) -> None:
        """Over ``count`` t, four by four, then one by one.

        a is contiguous; b goes on by ``stride`` values, as does what is asked for ahead of use, at every so many t.
        """
        builder = self.builder
        step = builder.mul(stride, self.int(self.item_bytes))
        done = builder.and_(count, self.int(-_UNROLLED))
        for first, last, size in ((self.int(0), done, _UNROLLED), (done, count, 1)):
            with cgutils.for_range_slice(builder, first, last, self.int(size)) as (start, _):
                for index in range(size):
                    t = builder.add(start, self.int(index))
                    offset = builder.mul(t, step)
                    if index % every == 0:
                        for pointer in ahead:
                            simd.ask_ahead(builder, builder.gep(pointer, [offset]), near=3)
                    self._add_one([builder.gep(row, [t]) for row in a], [builder.gep(p, [offset]) for p in b])

    def _add_one(self, a: list[Any], b: list[Any]) -> None:
        builder = self.builder
        factors = [simd.spread(builder, builder.load(pointer), WIDTH) for pointer in a]
        for column, pointer in enumerate(b):
            values = _load(builder, pointer, self._dtype)
            for row, factor in enumerate(factors):
                slot = self._sums[row][column]
                operands = [factor, values, builder.load(slot)]
                builder.store(simd.call_llvm(builder, f"llvm.fma.v{WIDTH}f32", _VEC, operands), slot)

    def _vector_at(self, pointer: Any, column: int) -> Any:
        target = self.builder.gep(pointer, [self.int(column * WIDTH)])
        return self.builder.bitcast(target, _VEC.as_pointer())

    def load(self, rows: list[Any]) -> None:
        """Goes on from the sums of each row."""
        for pointer, sums in zip(rows, self._sums, strict=True):
            for column, slot in enumerate(sums):
                value = self.builder.load(self._vector_at(pointer, column), align=4)
                self.builder.store(_reordered(self.builder, value, self._dtype, back=False), slot)

    def store(self, rows: list[Any]) -> None:
        """Writes the sums of each row, one vector after another."""
        for pointer, sums in zip(rows, self._sums, strict=True):
            for column, slot in enumerate(sums):
                value = _reordered(self.builder, self.builder.load(slot), self._dtype, back=True)
                self.builder.store(value, self._vector_at(pointer, column), align=4)


def keys_product(rows: int, vectors: int) -> Any:
    """An intrinsic: scores of some queries at 16 cells, or at twice 16.

    ``product(q, q_at, head_dim, keys, cells, ahead, block_size, c, at, stride)``: queries lie end to end; the keys of
    each sixteen cells begin at ``cells``, ``block_size`` apart from one value of the head to the next; those at
    ``ahead`` are needed soon; row i of c begins at ``at + i · stride``.
    """

    @intrinsic
    def product(typingctx, q, q_at, head_dim, keys, cells, ahead, block_size, c, at, stride):
        def codegen(context, builder, signature, args):
            q, q_at, head_dim, keys, cells, ahead, block_size, c, at, stride = args
            q_type, keys_type, c_type = (signature.args[index] for index in (0, 3, 7))
            tile = _Product(context, builder, keys_type.dtype, rows, vectors)
            b, soon = (
                [
                    tile.pointer(keys_type, keys, builder.extract_value(starts, column))
                    for column in range(vectors)
                ]
                for starts in (cells, ahead)
            )
            tile.add(
                tile.rows(q_type, q, q_at, head_dim), b, soon, block_size, head_dim, 4 // tile.item_bytes
            )
            tile.store(tile.rows(c_type, c, at, stride))
            return context.get_dummy_value()

        long, pair = types.int64, types.UniTuple(types.int64, 2)
        return types.void(q, long, long, keys, pair, pair, long, c, long, long), codegen

    return product


def values_product(rows: int, vectors: int) -> Any:
    """An intrinsic: weighted sums of values, 16 of the head or 32, are added to those so far.

    ``product(w, w_at, w_stride, values, blocks, block_size, head_dim, count, c, at, stride)``: row i of the weights
    begins at ``w_at + i · w_stride``, and row i of c at ``at + i · stride``; the cells are the first ``count`` of
    ``blocks``, which is (table, the first block's entry, their number, factor, offset): a block's values begin at
    ``table · factor + offset``.
    """

    @intrinsic
    def product(typingctx, w, w_at, w_stride, values, blocks, block_size, head_dim, count, c, at, stride):
        def codegen(context, builder, signature, args):
            w, w_at, w_stride, values, blocks, block_size, head_dim, count, c, at, stride = args
            w_type, values_type, blocks_type, c_type = (signature.args[index] for index in (0, 3, 4, 8))
            tile = _Product(context, builder, values_type.dtype, rows, vectors)
            weights, sums = tile.rows(w_type, w, w_at, w_stride), tile.rows(c_type, c, at, stride)
            table, entry, num_blocks, factor, offset = cgutils.unpack_tuple(builder, blocks, 5)

            def start_of(index: Any) -> Any:
                """Where the block's values begin."""
                place = simd.element(context, builder, blocks_type[0], table, builder.add(entry, index))
                block = builder.sext(builder.load(place), _I64)
                return builder.add(builder.mul(block, factor), offset)

            tile.load(sums)
            with cgutils.for_range(builder, num_blocks) as loop:
                done = builder.mul(loop.index, block_size)
                left = builder.sub(count, done)
                size = builder.select(builder.icmp_signed("<", left, block_size), left, block_size)
                start, following = start_of(loop.index), builder.add(loop.index, tile.int(1))
                is_last = builder.icmp_signed(">=", following, num_blocks)
                ahead = start_of(builder.select(is_last, loop.index, following))
                b = [builder.add(start, tile.int(column * WIDTH)) for column in range(vectors)]
                tile.add(
                    [builder.gep(row, [done]) for row in weights],
                    [tile.pointer(values_type, values, index) for index in b],
                    [tile.pointer(values_type, values, ahead)],
                    head_dim,
                    size,
                    1,
                )
            tile.store(sums)
            return context.get_dummy_value()

        long = types.int64
        return types.void(w, long, long, values, blocks, long, long, long, c, long, long), codegen

    return product
