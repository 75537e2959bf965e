"""How a step's attention is divided into units of work."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.attention.attend import num_scratch_values, part_cells, record_size
from manyhats.engine.backends.cpu.packing import Array
from manyhats.engine.backends.plan import Ints

Longs = npt.NDArray[np.int64]

QUERY_TILE = 16
"""Query rows of one sequence that go together, at most."""
_UNITS = 16
"""Per thread, if there are enough parts: larger units would leave threads waiting for each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """Tiles of query rows, each over all parts of its context or, where that is much work, over some of them.

    How a tile is divided changes no number: its parts are merged one by one in any case.

    Attributes:
        table: [U, 8] int32; for its columns see ``columns``.
        records: of the parts of divided tiles: for each part and query, its sums, largest score and total weight.
        finished: [divided tiles, Hkv] int64, zeros: how many of their units are done.
        num_scratch_values: float32 values that a thread needs for a unit.
    """

    table: Ints
    records: Tensor
    finished: Array
    num_scratch_values: int

    @classmethod
    def of(
        cls,
        query_start: Ints,
        context_len: Ints,
        heads: tuple[int, int, int],
        block_size: int,
        num_threads: int,
        *,
        sees_all: bool = False,
    ) -> Units:
        """The units of a step.

        Args:
            query_start, context_len: see ``StepPlan``.
            heads: H, Hkv, K.
            block_size: of the cache.
            num_threads: among which they are shared out.
            sees_all: whether rows see those that follow them, too.
        """
        num_heads, num_kv_heads, head_dim = heads
        size, num_units = part_cells(block_size), _UNITS * num_threads
        if len(query_start) == query_start[-1] + 1:
            parts = -(-context_len // size)
            table, num_divided, num_records = _divided_rows(parts.astype(np.int32).tobytes(), size, num_units)
        else:
            table, num_divided, num_records = _divided(query_start, context_len, size, num_units, sees_all)
        return cls(
            table,
            torch.empty(num_records * num_heads * record_size(head_dim)),
            np.zeros((num_divided, num_kv_heads), dtype=np.int64),
            num_scratch_values(block_size, head_dim, QUERY_TILE * (num_heads // num_kv_heads)),
        )

    def describe(self, frame: Array) -> None:
        """Enters their number, and the addresses of the arrays, into a step's frame."""
        frame[col.NUM_UNITS] = len(self.table)
        frame[col.UNITS] = self.table.ctypes.data
        frame[col.RECORDS] = self.records.data_ptr()
        frame[col.FINISHED] = self.finished.ctypes.data


def _divided(
    query_start: Ints, context_len: Ints, size: int, num_units: int, sees_all: bool = False
) -> tuple[Ints, int, int]:
    """The units, how many tiles have several, and how many parts of a row these have together."""
    counts = np.diff(query_start).astype(np.int64)
    sequence, first = _numbered(-(-counts // QUERY_TILE))
    first *= QUERY_TILE
    rows = np.minimum(QUERY_TILE, counts[sequence] - first)
    seen = context_len[sequence] if sees_all else context_len[sequence] - counts[sequence] + first + rows
    parts = -(-seen // size)
    work = rows * parts
    most = np.maximum(int(work.sum()) // num_units // rows, 1)
    units = -(-parts // most)
    is_divided = units > 1
    records = np.where(is_divided, work, 0)
    tile, index = _numbered(units)
    of_tiles = np.stack(
        [sequence, first, rows, units, np.cumsum(is_divided) - 1, np.cumsum(records) - records, parts, parts],
        axis=1,
    )
    table = of_tiles[tile].astype(np.int32)
    for column, piece in ((col.UNIT_FIRST_PART, index), (col.UNIT_LAST_PART, index + 1)):
        table[:, column] = piece * table[:, column] // table[:, col.UNIT_COUNT]
    return table, int(is_divided.sum()), int(records.sum())


@functools.lru_cache(maxsize=4)
def _divided_rows(parts: bytes, size: int, num_units: int) -> tuple[Ints, int, int]:
    """``_divided`` for one query row of each sequence, whose contexts have so many parts (int32).

    Steps that decode differ from the one before only when a context enters another part.
    """
    context_len = np.frombuffer(parts, dtype=np.int32) * size
    query_start = np.arange(len(context_len) + 1, dtype=np.int32)
    return _divided(query_start, context_len, size, num_units)


def _numbered(counts: Longs) -> tuple[Longs, Longs]:
    """For each member of groups of these sizes: its group, and its number within it."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
