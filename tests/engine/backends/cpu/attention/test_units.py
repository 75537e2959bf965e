from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.attention.units import QUERY_TILE, Units

SIZE = 256


@given(
    sequences=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 5000)), min_size=1, max_size=12),
    num_threads=st.sampled_from([1, 2, 16]),
)
def test_every_row_meets_every_part_of_its_context_once(
    sequences: list[tuple[int, int]], num_threads: int
) -> None:
    counts = [count for count, _ in sequences]
    query_start = np.cumsum([0, *counts], dtype=np.int32)
    context_len = np.array([count + before for count, before in sequences], dtype=np.int32)
    units = Units.of(query_start, context_len, (6, 2, 32), 16, num_threads)
    seen: Counter[tuple[int, int, int]] = Counter()
    of_tile: Counter[tuple[int, int]] = Counter()
    records: set[int] = set()
    for unit in units.table:
        sequence, first, rows = unit[[col.UNIT_SEQUENCE, col.UNIT_FIRST_ROW, col.UNIT_ROWS]].tolist()
        assert 0 < rows <= QUERY_TILE
        of_tile[sequence, first] += 1
        for part in range(unit[col.UNIT_FIRST_PART], unit[col.UNIT_LAST_PART]):
            seen.update((sequence, row, part) for row in range(first, first + rows))
            if unit[col.UNIT_COUNT] > 1:
                places = unit[col.UNIT_RECORD] + part * rows + np.arange(rows)
                assert not records & set(places.tolist())
                records.update(places.tolist())
    for sequence, (count, before) in enumerate(sequences):
        for row in range(count):
            tile_end = before + min(row // QUERY_TILE * QUERY_TILE + QUERY_TILE, count)
            for part in range(-(-tile_end // SIZE)):
                assert seen.pop((sequence, row, part)) == 1
    assert not seen
    assert all(
        unit[col.UNIT_COUNT] == of_tile[unit[col.UNIT_SEQUENCE], unit[col.UNIT_FIRST_ROW]]
        for unit in units.table
    )
    assert len(records) * 6 * (32 + 8) <= units.records.numel()
    assert len(units.finished) == sum(number > 1 for number in of_tile.values())


def test_a_long_context_alone_is_work_for_every_thread() -> None:
    alone = Units.of(np.array([0, 1], dtype=np.int32), np.array([4096], dtype=np.int32), (9, 3, 64), 16, 2)
    assert len(alone.table) == 16


def test_many_sequences_are_not_divided() -> None:
    count = np.arange(65, dtype=np.int32)
    many = Units.of(count, np.full(64, 4096, dtype=np.int32), (9, 3, 64), 16, 2)
    assert len(many.table) == 64
    assert many.records.numel() == 0
