"""Which text a row is of, and what its rows share."""

from __future__ import annotations

import numpy as np

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.addresses import floats_at, ints_at
from manyhats.engine.backends.cpu.compile import inner


@inner
def text_of(row, frame):
    """The index of a row's sequence among the step's."""
    starts = ints_at(frame[col.QUERY_START])
    text = 0
    while starts[text + 1] <= row:
        text += 1
    return text


@inner
def gate_of(op, row, which, frame, buffers):
    """A row's gate at an instruction that has some, by its number there."""
    gates = floats_at(buffers[op[col.GATES]])
    return gates[np.int64(text_of(row, frame)) * col.GATES_OF_TEXT + which]
