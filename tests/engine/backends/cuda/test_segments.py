"""How a step's rows are cut into segments."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS, most_segments, segments_of
from manyhats.engine.backends.plan import AdapterRows


@given(st.lists(st.integers(0, 3), max_size=150))
def test_segments_hold_every_row_with_an_adapter_once_and_one_adapter_each(row_slots: list[int]) -> None:
    rows = AdapterRows.of(np.array(row_slots, np.int32))
    segments = segments_of(rows)
    assert segments.dtype == np.int32
    assert segments.shape == (len(segments), 3)
    places = [place for _, first, count in segments.tolist() for place in range(first, first + count)]
    assert places == list(range(rows.rows.size))
    for slot, first, count in segments.tolist():
        assert 1 <= count <= SEGMENT_ROWS
        assert (rows.slots[first : first + count] == slot).all()


@given(st.lists(st.integers(0, 3), max_size=150))
def test_an_adapter_has_no_more_segments_than_its_rows_need(row_slots: list[int]) -> None:
    rows = AdapterRows.of(np.array(row_slots, np.int32))
    needed = sum(-(-len(list(of_slot)) // SEGMENT_ROWS) for _, of_slot in groupby(rows.slots.tolist()))
    assert len(segments_of(rows)) == needed <= most_segments(len(row_slots), 3)


def test_most_segments_are_reached() -> None:
    """One row each but for one adapter, whose rows fill whole segments and begin another."""
    row_slots = np.array([1, 2, *[3] * 33], np.int32)
    assert len(segments_of(AdapterRows.of(row_slots))) == most_segments(35, 3) == 5
