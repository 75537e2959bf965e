"""From a schedule to its step's plan."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from manyhats.engine.backends.plan import Floats, Ints, StepPlan, int32
from manyhats.engine.scheduling.schedule import Chunk, Schedule


def step_plan(schedule: Schedule, block_size: int) -> StepPlan:
    """The rows of a schedule that has chunks, in their order."""
    chunks = schedule.chunks
    counts = [chunk.num_rows for chunk in chunks]
    starts = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    token_ids: list[int] = []
    logit_rows: list[int] = []
    for chunk, end in zip(chunks, starts[1:].tolist(), strict=True):
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        token_ids += chunk.drafts
        logit_rows += range(end - chunk.num_logit_rows, end)
    tables = np.zeros((len(chunks), max(len(c.sequence.block_table) for c in chunks)), dtype=np.int32)
    for index, chunk in enumerate(chunks):
        tables[index, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
    owner = np.repeat(np.arange(len(chunks)), counts)
    first = np.array([chunk.start for chunk in chunks])
    index = np.arange(starts[-1]) - starts[owner] + first[owner]
    offsets = np.array([chunk.sequence.position_offset for chunk in chunks])
    return StepPlan(
        token_ids=int32(token_ids),
        positions=int32(index + offsets[owner]),
        cells=tables[owner, index // block_size].astype(np.int64) * block_size + index % block_size,
        query_start=starts,
        context_len=int32(first + counts),
        block_tables=tables,
        row_slots=int32([chunk.sequence.slot for chunk in chunks])[owner],
        logit_rows=int32(logit_rows),
        embeddings=_embeddings(chunks, starts.tolist()),
        block_copies=schedule.block_copies,
    )


def _embeddings(chunks: Seq[Chunk], starts: Seq[int]) -> tuple[Ints, Floats] | None:
    """The rows that are virtual tokens, and their embeddings."""
    rows: list[Ints] = []
    values: list[Floats] = []
    for chunk, first in zip(chunks, starts, strict=False):
        virtual = chunk.sequence.virtual
        embeddings = None if virtual is None else virtual.embeddings
        if embeddings is not None and chunk.start < embeddings.shape[0]:
            part = embeddings[chunk.start : chunk.end].numpy()
            rows.append(np.arange(first, first + part.shape[0], dtype=np.int32))
            values.append(part)
    return (np.concatenate(rows), np.concatenate(values)) if rows else None
