"""Plans of steps: which rows of which sequences, on which adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manyhats.engine.backends.plan import Ints, StepPlan, int32
from manyhats.engine.backends.wants import NO_TARGETS, Wants
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.sampler import SamplingRow, choices_of

BLOCK = 16
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Part:
    """Of a step: the rows of one sequence from ``start`` to before ``end``, on the adapter of a slot."""

    sequence: int
    start: int
    end: int
    slot: int = 0


def plan_of(parts: Sequence[Part], blocks_each: int, vocab_size: int) -> StepPlan:
    """A step of these; each chooses a token after its last row. Sequence s has blocks from ``s · blocks_each``."""
    rows = [np.arange(part.start, part.end, dtype=np.int32) for part in parts]
    counts = [len(each) for each in rows]
    first_cell = np.repeat([part.sequence * blocks_each * BLOCK for part in parts], counts)
    positions: Ints = np.concatenate(rows)
    starts = np.concatenate(([0], np.cumsum(counts)))
    tables = np.arange(blocks_each, dtype=np.int32) + blocks_each * int32([[part.sequence] for part in parts])
    return StepPlan(
        token_ids=(positions * 7919 + 13) % vocab_size,
        positions=positions,
        cells=(first_cell + positions).astype(np.int64),
        query_start=int32(starts),
        context_len=int32([part.end for part in parts]),
        block_tables=tables,
        row_slots=int32(np.repeat([part.slot for part in parts], counts)),
        logit_rows=int32(starts[1:] - 1),
    )


def greedy(count: int, vocab_size: int) -> Wants:
    """The most likely token of so many rows."""
    rows = [SamplingRow(params=_GREEDY) for _ in range(count)]
    return Wants(choices_of(rows, range(count), vocab_size), NO_TARGETS, np.empty(0, np.int32))
