"""Tiles of the product of rows of inputs and dense weights, unrolled in registers.

Sixteen output rows, a *group*, are the lanes, so no sum crosses lanes. Each output is one chain of sums over the
inputs in their order, then its bias: the same bits in every tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from manyhats.engine.backends.cpu.dense.instructions import Form, narrow
from manyhats.engine.backends.cpu.int16.instructions import FLOATS, I64, WORDS, splat
from manyhats.engine.backends.cpu.memory import Memory
from manyhats.engine.backends.cpu.packing import GROUP_ROWS


def _integer(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class _Tile:
    """A tile's instructions, whose operands are the arguments of ``make_tile``'s intrinsic."""

    def __init__(
        self, builder: Any, form: Form, arrays: tuple[Memory, ...], numbers: tuple[Any, ...]
    ) -> None:
        self._builder = builder
        self._form = form
        self._weights, self._x, self._bias, self._y = arrays
        self._group, self._last_group, self._row, self._num_rows, self._num_words, self._out = numbers

    def emit(self, num_rows: int, num_groups: int) -> None:
        """The loop over the inputs, and the stores behind it."""
        b, form = self._builder, self._form
        rows = self._clamped(self._row, num_rows, self._num_rows)
        groups = self._clamped(self._group, num_groups, self._last_group)
        row_words = b.mul(self._num_words, _integer(form.num_words))
        inputs = [b.mul(row, row_words) for row in rows]
        group_words = b.mul(self._num_words, _integer(GROUP_ROWS))
        weights = [b.mul(group, group_words) for group in groups]
        totals = [[cgutils.alloca_once_value(b, splat(FLOATS, 0.0)) for _ in groups] for _ in rows]
        with cgutils.for_range(b, self._num_words) as loop:
            at = b.mul(loop.index, _integer(GROUP_ROWS))
            values = [form.decode(b, self._weights.load(b.add(start, at), WORDS)) for start in weights]
            first = b.mul(loop.index, _integer(form.num_words))
            for word in range(form.num_words):
                for start, of_row in zip(inputs, totals, strict=True):
                    x = self._x.spread(b.add(start, b.add(first, _integer(word))))
                    for value, total in zip(values, of_row, strict=True):
                        b.store(form.add(b, b.load(total), value[word], x), total)
        for column, group in enumerate(groups):
            place = b.mul(group, _integer(GROUP_ROWS))
            bias = self._bias.load(place, FLOATS)
            for row, of_row in zip(rows, totals, strict=True):
                total = b.fadd(b.load(of_row[column]), bias)
                self._y.store(b.add(b.mul(row, self._out), place), total)

    def _clamped(self, first: Any, count: int, end: Any) -> list[Any]:
        """So many from the first on; past the end, the last one again."""
        b = self._builder
        last = b.sub(end, _integer(1))
        numbers = [b.add(first, _integer(offset)) for offset in range(count)]
        return [b.select(b.icmp_signed("<", number, last), number, last) for number in numbers]


def make_tile(form: Form, num_rows: int, num_groups: int) -> Any:
    """A tile as an intrinsic."""

    @intrinsic
    def tile(typingctx, weights, x, bias, y, group, groups, row, rows, words, out):
        """y[row …, group …] = x Wᵀ + b.

        Args:
            weights: [groups, words, 16], 32-bit words; see ``instructions``.
            x: [rows, words · the form's], 32-bit words.
            bias: [groups · 16] float32.
            y: [rows, out] float32.
            group: the tile's first; from ``groups`` on, the one before that is computed again.
            row: the tile's first; from ``rows`` on likewise.
            words: of a group's outputs.
            out: of a row of y.
        """

        def codegen(context, builder, signature, args):
            arrays = tuple(
                Memory(context, builder, kind, array)
                for kind, array in zip(signature.args[:4], args[:4], strict=True)
            )
            _Tile(builder, form, arrays, tuple(args[4:])).emit(num_rows, num_groups)
            return context.get_dummy_value()

        return types.void(weights, x, bias, y, *[types.int64] * 6), codegen

    return tile


@intrinsic
def narrow_values(typingctx, x, at, out, out_at):
    """Eight pairs of bfloat16 in out[out_at : out_at + 8], 32-bit words, of the float32 values x[at : at + 16]."""

    def codegen(context, builder, signature, args):
        source, target = (Memory(context, builder, signature.args[i], args[i]) for i in (0, 2))
        target.store(args[3], narrow(builder, source.load(args[1], FLOATS)))
        return context.get_dummy_value()

    return types.void(x, types.int64, out, types.int64), codegen
