"""A plan as tensors, for backends that run it on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.packing import Array
from manyhats.engine.backends.plan import AdapterRows, StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step as a forward on the host reads it; N tokens of B sequences.

    Attributes:
        token_ids: [N] int32.
        positions: [N] int32.
        cells: [N] int64.
        query_start: [B + 1] int32.
        text_slots: [B] int32, each sequence's adapter slot.
        context_len: [B] int32.
        block_tables: [B, longest] int32.
        adapter_rows: rows with an adapter.
        logit_rows: [M] int32.
        hidden_rows: [H] int32.
        token_types: [N] int32.
        logit_adapter_rows: those of them with an adapter, as indices into ``logit_rows``.
        normed_rows: [E] int32, rows that enter behind the norm of the embeddings.
        normed: [E, D], what enters there.
        embeddings: (rows [E] int64, values [E, D]); None for none.
    """

    token_ids: Tensor
    positions: Tensor
    cells: Tensor
    query_start: Tensor
    text_slots: Tensor
    context_len: Tensor
    block_tables: Tensor
    adapter_rows: AdapterRows
    logit_rows: Tensor
    hidden_rows: Tensor
    token_types: Tensor
    logit_adapter_rows: AdapterRows
    normed_rows: Tensor
    normed: Tensor
    embeddings: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, plan: StepPlan) -> Batch:
        """The same step; see ``StepPlan`` for what is not said here."""
        embeddings = None
        if plan.embeddings is not None:
            rows, values = plan.embeddings
            embeddings = torch.from_numpy(rows).long(), torch.from_numpy(values)
        normed_rows, normed = plan.normed or (np.empty(0, np.int32), np.empty(0, np.float32))
        return cls(
            token_ids=torch.from_numpy(plan.token_ids),
            positions=torch.from_numpy(plan.positions),
            cells=torch.from_numpy(plan.cells),
            query_start=torch.from_numpy(plan.query_start),
            text_slots=torch.from_numpy(plan.row_slots[plan.query_start[:-1]]),
            context_len=torch.from_numpy(plan.context_len),
            block_tables=torch.from_numpy(plan.block_tables),
            adapter_rows=AdapterRows.of(plan.row_slots),
            logit_rows=torch.from_numpy(plan.logit_rows),
            hidden_rows=torch.from_numpy(plan.hidden_rows),
            token_types=torch.from_numpy(plan.token_types),
            logit_adapter_rows=AdapterRows.of(plan.row_slots[plan.logit_rows]),
            normed_rows=torch.from_numpy(normed_rows),
            normed=torch.from_numpy(normed),
            embeddings=embeddings,
        )

    def describe(self, frame: Array) -> None:
        """Enters its numbers, and the addresses of its arrays, into a step's frame."""
        frame[col.NUM_ROWS] = self.token_ids.shape[0]
        frame[col.NUM_TEXTS] = self.text_slots.shape[0]
        frame[col.TEXT_SLOTS] = self.text_slots.data_ptr()
        frame[col.NUM_LOGIT_ROWS] = self.logit_rows.shape[0]
        frame[col.MAX_BLOCKS] = self.block_tables.shape[1]
        frame[col.POSITIONS] = self.positions.data_ptr()
        frame[col.CELLS] = self.cells.data_ptr()
        frame[col.QUERY_START] = self.query_start.data_ptr()
        frame[col.CONTEXT_LEN] = self.context_len.data_ptr()
        frame[col.BLOCK_TABLES] = self.block_tables.data_ptr()
        frame[col.LOGIT_ROWS] = self.logit_rows.data_ptr()
        frame[col.NUM_HIDDEN_ROWS] = self.hidden_rows.shape[0]
        frame[col.HIDDEN_ROWS] = self.hidden_rows.data_ptr()
        frame[col.NUM_NORMED_ROWS] = self.normed_rows.shape[0]
        frame[col.NORMED_ROWS] = self.normed_rows.data_ptr()
        frame[col.TOKEN_TYPES] = self.token_types.data_ptr()
