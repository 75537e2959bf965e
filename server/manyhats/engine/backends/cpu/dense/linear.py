"""y = x Wᵀ + b for dense weights whose outputs are the lanes, whatever the number of rows."""

from __future__ import annotations

from typing import Any

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import floats_at, ints_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.dense.instructions import FLOAT32, HAS_WIDE, PAIRS, WIDENED, Form
from manyhats.engine.backends.cpu.dense.tile import make_tile, narrow_values
from manyhats.engine.backends.cpu.packing import GROUP_ROWS, GROUPS

_TALL, _ABREAST = (8, GROUPS) if HAS_WIDE else (6, 1)
"""Rows and groups whose sums fit the registers beside what they are made of."""


def _multiplier(form: Form) -> Any:
    """The function that multiplies with weights of a form."""
    # Few rows wait for memory, which is read fastest in one stream.
    one_row, two_rows = make_tile(form, 1, 1), make_tile(form, 2, 1)
    four_rows, tall = make_tile(form, 4, _ABREAST), make_tile(form, _TALL, _ABREAST)
    num_inputs = form.num_inputs

    @inner
    def multiply(op, x, num_rows, groups, y, out):
        weights, bias = ints_at(op[col.WEIGHTS]), floats_at(op[col.BIAS])
        words = op[col.SIZE] // num_inputs
        first, last = groups
        row = 0
        while row < num_rows:
            rest = num_rows - row
            step = _ABREAST if rest > 2 else 1
            for group in range(first, last, step):
                if rest == 1:
                    one_row(weights, x, bias, y, group, last, row, num_rows, words, out)
                elif rest == 2:
                    two_rows(weights, x, bias, y, group, last, row, num_rows, words, out)
                elif rest <= 4:
                    four_rows(weights, x, bias, y, group, last, row, num_rows, words, out)
                else:
                    tall(weights, x, bias, y, group, last, row, num_rows, words, out)
            row += _TALL

    return multiply


_multiply_floats, _multiply_widened, _multiply_pairs = map(_multiplier, (FLOAT32, WIDENED, PAIRS))


@inner
def multiply_dense(op, x, num_rows, groups, y, out):
    """y[:, group · 16 …] = x Wᵀ + bias for some groups of sixteen outputs.

    Args:
        op: a linear's instruction.
        x: [num_rows, words] int32: the bits of float32, or pairs of bfloat16.
        num_rows: of x and y.
        groups: the first, and the last, exclusive.
        y: [num_rows, out] float32.
        out: of a row of y.
    """
    kind = op[col.KIND]
    if kind == col.BFLOAT16_PAIRS:
        _multiply_pairs(op, x, num_rows, groups, y, out)
    elif kind == col.BFLOAT16_GROUPS:
        _multiply_widened(op, x, num_rows, groups, y, out)
    else:
        _multiply_floats(op, x, num_rows, groups, y, out)


@inner
def linear_dense(op, x, y, num_rows, first, last):
    """y[:, rows first … last of W] = x Wᵀ + bias.

    Args:
        op: the instruction that has the weights; ``first`` is where a panel begins.
        x: rows as ``multiply_dense`` takes them.
        y: float32.
        num_rows: of both.
        first, last: rows of the weights.
    """
    end = last // GROUP_ROWS
    for group in range(first // GROUP_ROWS, end, GROUPS):
        multiply_dense(op, x, num_rows, (group, min(group + GROUPS, end)), y, op[col.NUM_OUT])


@inner
def narrow_row(x, at, size, out, row):
    """x[at : at + size] rounded to bfloat16, as a row of ``out``; size a multiple of sixteen."""
    out_at = row * (size // 2)
    for i in range(0, size, 16):
        narrow_values(x, at + i, out, out_at + i // 2)
