"""From a schedule to the tensors of its step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.batch import QUERY_TILE, AdapterRows, Batch
from manyhats.engine.scheduling.schedule import Chunk, Schedule


def num_logit_rows(chunk: Chunk) -> int:
    """How many of a chunk's rows need logits: its last if that ends the tokens, and those being scored."""
    return chunk.num_tokens - _first_logit_row(chunk)


def _first_logit_row(chunk: Chunk) -> int:
    last = chunk.num_tokens - 1 if chunk.ends_tokens else chunk.num_tokens
    scored = chunk.sequence.logits_from
    if scored is None:
        return last
    return min(last, max(0, scored - chunk.start))


def build_batch(schedule: Schedule, block_size: int) -> Batch:
    """The tensors of a schedule, on the CPU."""
    chunks = schedule.chunks
    counts = [chunk.num_tokens for chunk in chunks]
    starts = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    token_ids: list[int] = []
    logit_rows: list[int] = []
    for chunk, first in zip(chunks, starts.tolist(), strict=False):
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        logit_rows += range(first + _first_logit_row(chunk), first + chunk.num_tokens)
    slots = [chunk.sequence.slot for chunk in chunks]
    tables = np.zeros((len(chunks), max(len(c.sequence.block_table) for c in chunks)), dtype=np.int32)
    for index, chunk in enumerate(chunks):
        tables[index, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
    owner = np.repeat(np.arange(len(chunks)), counts)
    first_position = np.array([chunk.start for chunk in chunks])
    index = np.arange(starts[-1]) - starts[owner] + first_position[owner]
    offsets = np.array([chunk.sequence.position_offset for chunk in chunks])
    slot_mapping = tables[owner, index // block_size].astype(np.int64) * block_size + index % block_size
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(index + offsets[owner]),
        slot_mapping=torch.from_numpy(slot_mapping),
        query_start=torch.from_numpy(starts),
        context_len=torch.from_numpy((first_position + counts).astype(np.int32)),
        block_tables=torch.from_numpy(tables),
        tiles=torch.from_numpy(_tiles(counts)),
        adapter_rows=_adapter_rows(slots, counts),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        logit_adapter_rows=_adapter_rows(slots, [num_logit_rows(chunk) for chunk in chunks]),
        embeddings=_embeddings(chunks, starts.tolist()),
        block_copies=schedule.block_copies,
    )


def _embeddings(chunks: Seq[Chunk], starts: Seq[int]) -> tuple[Tensor, Tensor] | None:
    """Rows that are virtual tokens, and what they are."""
    rows: list[Tensor] = []
    values: list[Tensor] = []
    for chunk, first in zip(chunks, starts, strict=False):
        virtual = chunk.sequence.virtual
        embeddings = None if virtual is None else virtual.embeddings
        if embeddings is not None and chunk.start < embeddings.shape[0]:
            part = embeddings[chunk.start : chunk.end]
            rows.append(torch.arange(first, first + part.shape[0]))
            values.append(part)
    return (torch.cat(rows), torch.cat(values)) if rows else None


def _tiles(counts: Seq[int]) -> np.ndarray:
    rows = [
        (sequence, first, min(QUERY_TILE, count - first))
        for sequence, count in enumerate(counts)
        for first in range(0, count, QUERY_TILE)
    ]
    return np.array(rows, dtype=np.int32)


def _adapter_rows(slots: Seq[int], counts: Seq[int]) -> AdapterRows:
    per_row = np.repeat(np.array(slots, dtype=np.int32), counts)
    rows = np.nonzero(per_row)[0].astype(np.int32)
    rows = rows[np.argsort(per_row[rows], kind="stable")]
    return AdapterRows(
        rows=torch.from_numpy(rows),
        slots=torch.from_numpy(per_row[rows]),
        num_adapters=len(set(slots) - {0}),
    )
