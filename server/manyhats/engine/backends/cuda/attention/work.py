"""How a step's attention is cut into items of work, on the host, from a plan's numbers alone.

A tile of query rows goes through the splits of its context in one item, or in as many as there are splits, whose parts
``combine`` adds: the same additions in the same order, so which of the two it is may depend on how much else there is
to do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import triton

from manyhats.engine.backends.plan import Ints, StepPlan
from manyhats.engine.model.architecture import Attention

SPLIT = 256
"""Positions in a split, which are counted from 0."""
_EVEN = 4
"""A tile is split if it is more than one part in so many of what each program has to do."""
Flags = npt.NDArray[np.bool_]
_SEQUENCE, _ROW, _ROWS, _POSITION, _LENGTH, _FIRST, _END, _SLOT = range(8)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How rows, heads and positions are cut; the same for all steps of a model.

    Attributes:
        size: rows times heads of a tile of queries, what the tensor cores take.
        num_heads: query heads in it, which share a head of keys.
        head_tiles: tiles that all query heads of a row need.
        head_size: K or more, a power of two.
        tile: positions multiplied at a time.
        split: positions in a split, a multiple of ``tile``.
    """

    size: int
    num_heads: int
    head_tiles: int
    head_size: int
    tile: int
    split: int = SPLIT

    @classmethod
    def of(cls, attention: Attention) -> Tiling:
        """That of an architecture."""
        group = attention.num_heads // attention.num_kv_heads
        num_heads = min(group, 32)
        head_size = max(16, triton.next_power_of_2(attention.head_dim))
        return cls(
            size=16 if group <= 16 else 32,
            num_heads=num_heads,
            head_tiles=attention.num_kv_heads * -(-group // num_heads),
            head_size=head_size,
            tile=max(16, min(64, 8192 // head_size)),
        )

    @property
    def num_rows(self) -> int:
        """Query rows in a tile."""
        return self.size // self.num_heads


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What there is to do in a step, as the kernels read it.

    Attributes:
        items: [W, 8] int32; W is at most the number of rows and ``num_slots`` together.
        merges: [R, 4] int32, rows whose splits are apart; at most all rows.
        num_slots: how many parts they have.
    """

    items: Ints
    merges: Ints
    num_slots: int


def work_of(plan: StepPlan, attention: Attention, tiling: Tiling, num_lanes: int, max_slots: int) -> Work:
    """The work of a step's attention; layers of the same window have the same.

    Args:
        plan: the step.
        attention: the layers'; says what a row sees.
        tiling: of the model.
        num_lanes: programs that walk the items at the same time.
        max_slots: parts that there is room for.
    """
    tiles = _tiles_of(plan, attention, tiling)
    is_split = _are_split(tiles, num_lanes, max_slots)
    whole, split = tiles[~is_split], tiles[is_split]
    sizes = _num_splits(split) * split[:, _ROWS]
    split[:, _SLOT] = np.cumsum(sizes) - sizes
    longest_first = np.argsort(-_num_splits(whole), kind="stable")
    items = np.concatenate((whole[longest_first], _apart(split)))
    return Work(items, _merges_of(split), int(sizes.sum(initial=0)))


def _num_splits(tiles: Ints) -> Ints:
    """[T] int32."""
    counts: Ints = tiles[:, _END] - tiles[:, _FIRST]
    return counts


def _apart(tiles: Ints) -> Ints:
    """Each split of tiles as an item of its own, with slots for all rows of the tile."""
    counts = _num_splits(tiles)
    items = np.repeat(tiles, counts, axis=0)
    index = _ramp(counts)
    items[:, _FIRST] += index
    items[:, _END] = items[:, _FIRST] + 1
    items[:, _SLOT] += index * items[:, _ROWS]
    return items


def _merges_of(tiles: Ints) -> Ints:
    """Row, first slot, slots from split to split, and number of splits, of each row of tiles whose splits are apart."""
    rows = tiles[:, _ROWS]
    of_rows, index = np.repeat(tiles, rows, axis=0), _ramp(rows)
    columns = of_rows[:, _ROW] + index, of_rows[:, _SLOT] + index, of_rows[:, _ROWS], _num_splits(of_rows)
    return np.stack(columns, axis=1).astype(np.int32)


def _tiles_of(plan: StepPlan, attention: Attention, tiling: Tiling) -> Ints:
    """Each tile as one item, all splits of its context: [T, 8] int32."""
    size, counts = tiling.num_rows, np.diff(plan.query_start)
    per_sequence = -(-counts // size)
    sequence = np.repeat(np.arange(len(counts), dtype=np.int32), per_sequence)
    within = _ramp(per_sequence) * size
    rows = np.minimum(size, counts[sequence] - within)
    length = plan.context_len[sequence]
    position = length - counts[sequence] + within
    first, end = np.zeros_like(position), length
    if attention.window is not None:
        first = np.maximum(0, position + 1 - attention.window) // tiling.split
        end = np.minimum(position + rows - 1 + attention.window, length)
    if not attention.sees_all:
        end = position + rows
    slot = np.full_like(sequence, -1)
    columns = (
        sequence,
        plan.query_start[sequence] + within,
        rows,
        position,
        length,
        first,
        -(-end // tiling.split),
        slot,
    )
    return np.stack(columns, axis=1).astype(np.int32)


def _are_split(tiles: Ints, num_lanes: int, max_slots: int) -> Flags:
    """Which tiles' splits become items of their own: those that would keep one program busy for too long.

    If there is not room for the parts of all of these, then the longest.
    """
    counts = _num_splits(tiles).astype(np.int64)
    is_long: Flags = (counts > 1) & (counts * _EVEN * num_lanes > counts.sum())
    order = np.argsort(-counts, kind="stable")
    left = max_slots
    for tile in order[is_long[order]].tolist():
        size = int(counts[tile] * tiles[tile, _ROWS])
        is_long[tile] = size <= left
        left -= size if size <= left else 0
    return is_long


def _ramp(counts: Ints) -> Ints:
    """0 … n − 1 for each n of ``counts``, end to end."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum(), dtype=np.int32) - np.repeat(ends - counts, counts).astype(np.int32)
