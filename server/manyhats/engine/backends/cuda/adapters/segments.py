"""The rows of a step by adapter, as the kernels take them: a few rows of one adapter share one read of its matrices."""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.plan import AdapterRows, Ints

SEGMENT_ROWS = 16
"""Rows of one adapter that are taken together: what one tensor-core instruction takes."""


def segments_of(rows: AdapterRows) -> Ints:
    """Cut rows that are sorted by adapter: [S, 3] int32, each segment's slot, first place among them, and size."""
    slots = rows.slots
    place = np.arange(slots.size)
    is_first = (place - np.searchsorted(slots, slots)) % SEGMENT_ROWS == 0
    first = np.flatnonzero(is_first)
    sizes = np.diff(first, append=slots.size)
    return np.stack((slots[first], first, sizes), axis=1).astype(np.int32)


def most_segments(num_rows: int, num_kinds: int, size: int = SEGMENT_ROWS) -> int:
    """The most segments, of so many rows each, that rows of so many kinds can come to."""
    distinct = min(num_rows, num_kinds)
    return distinct + (num_rows - distinct) // size
