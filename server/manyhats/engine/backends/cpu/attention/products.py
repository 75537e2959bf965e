"""The two products of attention over the cells of some blocks, in tiles that suit the number of query rows.

``blocks`` is (block table, an entry, values from one block to the next, where the head's blocks begin); cells are
counted from those of the entry. A tile only says what is computed at the same time: see ``tiles``.
"""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu.attention.tiles import IS_WIDE, WIDTH, keys_product, values_product
from manyhats.engine.backends.cpu.compile import inner
from manyhats.engine.backends.cpu.simd import store, zero

ROWS = 6
"""Query rows at a time, at most."""
_CELLS = 64
"""Positions whose values are summed at a time: they stay in the nearest cache until all of the head is done."""


@inner
def next_cells(cells, block_size, last):
    """The next sixteen cells, as block and cell within it, or the same if they are the last."""
    block, cell = cells
    if block * block_size + cell + WIDTH >= last:
        return cells
    return (block, cell + WIDTH) if cell + WIDTH < block_size else (block + 1, cell * 0)


@inner
def keys_at(blocks, cells):
    """Where the keys of some cells begin."""
    table, entry, factor, offset = blocks
    return table[entry + cells[0]] * factor + offset + cells[1]


def _scores(rows, vectors):
    product = keys_product(rows, vectors)
    step = WIDTH * vectors

    @inner
    def scores(q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride):
        """w[i, first : last] = q Kᵀ of some rows, and of a whole number of tiles, so up to 16 more."""
        c0 = first // block_size, np.int64(0)
        for cell in range(first, last, step):
            # Past the end, the last cells once more.
            c1 = next_cells(c0, block_size, last)
            c2 = next_cells(c1, block_size, last) if vectors == 2 else c1
            c3 = next_cells(c2, block_size, last)
            cells = keys_at(blocks, c0), keys_at(blocks, c1)
            ahead = keys_at(blocks, c2), keys_at(blocks, c3)
            product(q, q_at, head_dim, keys, cells, ahead, block_size, w, at + cell, stride)
            c0 = c2

    return scores


def _sums(rows, vectors):
    narrow = values_product(rows, 1)
    wide = values_product(rows, vectors)
    step = WIDTH * vectors

    @inner
    def sums(w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride):
        """c[i] = Σ w[i, t] · values[t] of some rows over the first ``count`` cells."""
        table, entry, factor, offset = blocks
        for row in range(rows):
            for i in range(0, head_dim, 8):
                store(c, c_at + row * c_stride + i, zero())
        few = max(_CELLS // block_size, 1)
        all_blocks = (count + block_size - 1) // block_size
        for block in range(0, all_blocks, few):
            done = block * block_size
            left = min(count - done, few * block_size)
            num_blocks = min(all_blocks - block, few)
            for i in range(0, head_dim, step):
                of_head = table, entry + block, num_blocks, factor, offset + i
                if vectors == 1 or i + step <= head_dim:
                    wide(
                        w,
                        at + done,
                        stride,
                        values,
                        of_head,
                        block_size,
                        head_dim,
                        left,
                        c,
                        c_at + i,
                        c_stride,
                    )
                else:
                    narrow(
                        w,
                        at + done,
                        stride,
                        values,
                        of_head,
                        block_size,
                        head_dim,
                        left,
                        c,
                        c_at + i,
                        c_stride,
                    )

    return sums


# Two vectors where one would be too few chains at once and two fit the registers.
_TWO = 2 if IS_WIDE else 1
_scores_6, _scores_4, _scores_3 = _scores(6, _TWO), _scores(4, _TWO), _scores(3, _TWO)
_scores_2, _scores_1 = _scores(2, 2), _scores(1, 2)
_sums_6, _sums_4, _sums_3, _sums_2, _sums_1 = (
    _sums(6, _TWO),
    _sums(4, _TWO),
    _sums(3, _TWO),
    _sums(2, 2),
    _sums(1, 2),
)


@inner
def rows_at_once(left):
    """How many of the rows left go together."""
    return 6 if left >= 6 else min(left, 4)


@inner
def score_rows(rows, q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride):
    """Scores of as many rows as ``rows_at_once`` said."""
    if rows == 6:
        _scores_6(q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride)
    elif rows == 4:
        _scores_4(q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride)
    elif rows == 3:
        _scores_3(q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride)
    elif rows == 2:
        _scores_2(q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride)
    else:
        _scores_1(q, q_at, head_dim, keys, blocks, block_size, first, last, w, at, stride)


@inner
def sum_rows(rows, w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride):
    """Weighted sums of values for as many rows."""
    if rows == 6:
        _sums_6(w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride)
    elif rows == 4:
        _sums_4(w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride)
    elif rows == 3:
        _sums_3(w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride)
    elif rows == 2:
        _sums_2(w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride)
    else:
        _sums_1(w, at, stride, values, blocks, block_size, head_dim, count, c, c_at, c_stride)
