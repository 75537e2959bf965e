"""From a schedule to its step's plan."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from manyhats.engine.backends.plan import Floats, Ints, StepPlan, int32
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.sequence import Sequence

_NO_CHOICES: Mapping[Sequence, int] = {}


def step_plan(schedule: Schedule, block_size: int, choices: Mapping[Sequence, int] = _NO_CHOICES) -> StepPlan:
    """The rows of a schedule that has chunks, in their order.

    Args:
        schedule: the newest.
        block_size: cells per block.
        choices: which choice of the step in flight is the next token of a sequence that does not have it yet.
    """
    chunks = schedule.chunks
    # Lists of numbers: for the few rows of most steps, NumPy's operations would take longer.
    starts = [0]
    token_ids: list[int] = []
    positions: list[int] = []
    cells: list[int] = []
    slots: list[int] = []
    token_types: list[int] = []
    logit_rows: list[int] = []
    hidden_rows: list[int] = []
    for chunk in chunks:
        sequence, rows = chunk.sequence, range(chunk.start, chunk.start + chunk.num_rows)
        table, offset = sequence.block_table, sequence.position_offset
        token_ids += sequence.token_ids[chunk.start : chunk.end]
        if chunk.end > len(sequence.token_ids):
            token_ids.append(-1 - choices[sequence])
        token_ids += chunk.drafts
        positions += [max(row + offset, 0) for row in rows]  # virtual tokens may have none
        cells += [table[row // block_size] * block_size + row % block_size for row in rows]
        slots += [sequence.slot] * len(rows)
        if sequence.is_whole:
            token_types += sequence.token_types[chunk.start : chunk.end] or [0] * len(rows)
        starts.append(starts[-1] + len(rows))
        wanted = hidden_rows if sequence.reads_hidden else logit_rows
        wanted += range(starts[-1] - chunk.num_result_rows, starts[-1])
    tables = np.zeros((len(chunks), max(len(c.sequence.block_table) for c in chunks)), dtype=np.int32)
    for index, chunk in enumerate(chunks):
        tables[index, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
    return StepPlan(
        token_ids=int32(token_ids),
        positions=int32(positions),
        cells=np.array(cells, dtype=np.int64),
        query_start=int32(starts),
        context_len=int32([chunk.start + chunk.num_rows for chunk in chunks]),
        block_tables=tables,
        row_slots=int32(slots),
        logit_rows=int32(logit_rows),
        hidden_rows=int32(hidden_rows),
        token_types=int32(token_types),
        embeddings=_embeddings(chunks, starts, are_normed=False),
        normed=_embeddings(chunks, starts, are_normed=True),
        block_copies=schedule.block_copies,
    )


def _embeddings(chunks: Seq[Chunk], starts: Seq[int], *, are_normed: bool) -> tuple[Ints, Floats] | None:
    """The rows that are virtual tokens of one sort, and their embeddings."""
    rows: list[Ints] = []
    values: list[Floats] = []
    for chunk, first in zip(chunks, starts, strict=False):
        virtual = chunk.sequence.leading or chunk.sequence.virtual
        if virtual is None or virtual.are_normed != are_normed:
            continue
        embeddings = virtual.embeddings
        if embeddings is not None and chunk.start < embeddings.shape[0]:
            part = embeddings[chunk.start : chunk.end].numpy()
            rows.append(np.arange(first, first + part.shape[0], dtype=np.int32))
            values.append(part)
    return (np.concatenate(rows), np.concatenate(values)) if rows else None
