"""y = x Wᵀ + b for weights in codes and inputs in 16-bit integers, whatever the number of rows.

Inputs have a step for each block of 64, and weights' scales are 16-bit fixed point in a unit of each output row. A few
rows multiply weights that are decoded in registers. For more, a group of sixteen output rows is decoded into a
thread's own scratch once, and read for a tile of rows at a time. The arithmetic is the same.
"""

from __future__ import annotations

from typing import Any

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import floats_at, halves_at, ints_at
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.int16.instructions import HAS_WIDE, INT8, LANES, NF4, Codes
from manyhats.engine.backends.cpu.int16.tile import OCTET, PAIRS, make_decoder, make_tile
from manyhats.engine.backends.cpu.packing import GROUPS

_TALL = 8 if HAS_WIDE else 4
"""Rows whose sums, of a group each, fit the registers beside what they are made of."""

_FEW = 8 if HAS_WIDE else 2
"""Rows that multiply weights decoded in registers, if there are no more."""
_REST = 2
"""The same behind whole tiles of tall ones."""

_AHEAD = 1024
"""Words of codes that are asked for before they are read, where they are decoded in registers.

One group after another, as they lie in memory: processors read ahead along one such stream best.
"""


def _multiplier(codes: Codes) -> Any:
    """The function that multiplies with weights in such codes."""
    one_row, two_rows, four_rows, eight_rows = (
        make_tile(codes, rows, is_decoded=False) for rows in (1, 2, 4, 8)
    )
    four_decoded, tall_decoded = (make_tile(codes, rows, is_decoded=True) for rows in (4, _TALL))
    decode = make_decoder(codes)
    stride = codes.num_words * LANES

    @inner
    def multiply(op, x, num_rows, groups, y, out, panel, at):
        """y[:, group · 16 …] = x Wᵀ + b for a panel or less.

        Args:
            op: a linear's instruction.
            x: [num_rows, size / 2 + size / 64], rows of integers with their steps.
            num_rows: of x and y.
            groups: the first, and the last, exclusive.
            y: [num_rows, out] float32.
            out: of a row of y.
            panel: from ``at`` on, scratch for a decoded group.
        """
        weights, scales = ints_at(op[col.WEIGHTS]), halves_at(op[col.ABSMAX])
        units, bias = floats_at(op[col.ROW_OFFSET]), floats_at(op[col.BIAS])
        size = op[col.SIZE]
        octets = size // OCTET
        first, last = groups
        tall = 0
        if num_rows > _FEW:
            tall = num_rows - num_rows % _TALL if num_rows % _TALL <= _REST else num_rows
        rest = num_rows - tall
        if tall:
            for group in range(first, last):
                start, ahead = group * octets * stride, (group + 1) * octets * stride
                for octet in range(octets):
                    decode(weights, start + octet * stride, panel, at + octet * PAIRS * LANES)
                row = 0
                while row < tall:
                    if tall - row > 4 and _TALL > 4:
                        tall_decoded(
                            panel, weights, scales, units, bias, x, y, at, ahead, group, row, tall, size, out
                        )  # fmt: skip
                        row += _TALL
                    else:
                        four_decoded(
                            panel, weights, scales, units, bias, x, y, at, ahead, group, row, tall, size, out
                        )  # fmt: skip
                        row += 4
        if num_rows > tall:
            for group in range(first, last):
                start = group * octets * stride
                ahead = start + _AHEAD
                if rest == 1:
                    one_row(
                        weights, weights, scales, units, bias, x, y, start, ahead, group, tall, num_rows, size, out
                    )  # fmt: skip
                elif rest == 2 or _FEW == 2:
                    two_rows(
                        weights, weights, scales, units, bias, x, y, start, ahead, group, tall, num_rows, size, out
                    )  # fmt: skip
                elif rest <= 4:
                    four_rows(
                        weights, weights, scales, units, bias, x, y, start, ahead, group, tall, num_rows, size, out
                    )  # fmt: skip
                else:
                    eight_rows(
                        weights, weights, scales, units, bias, x, y, start, ahead, group, tall, num_rows, size, out
                    )  # fmt: skip

    return multiply


multiply_nf4, multiply_int8 = _multiplier(NF4), _multiplier(INT8)


@inner
def linear_by_int16(op, x, y, num_rows, first, last, panel, at):
    """y[:, rows first … last of W] = x Wᵀ + bias.

    Args:
        op: the instruction that has the weights; ``first`` is where a panel begins.
        x: rows of integers with their steps.
        y: float32.
        num_rows: of both.
        first, last: rows of the weights.
        panel: from ``at`` on, scratch for a decoded group.
    """
    end = last // LANES
    for group in range(first // LANES, end, GROUPS):
        groups = group, min(group + GROUPS, end)
        if op[col.KIND] == col.NF4_BY_INT16:
            multiply_nf4(op, x, num_rows, groups, y, op[col.NUM_OUT], panel, at)
        else:
            multiply_int8(op, x, num_rows, groups, y, op[col.NUM_OUT], panel, at)
