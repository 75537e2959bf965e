"""A step as given to a backend: every token of every scheduled sequence, as numbers on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Cells = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRows:
    """The rows that have an adapter, sorted by adapter.

    Attributes:
        rows: [A] int32, their indices.
        slots: [A] int32, the adapter slot of each; never 0, the base model's.
        num_adapters: distinct slots.
    """

    rows: Ints
    slots: Ints
    num_adapters: int

    @classmethod
    def of(cls, row_slots: Ints) -> AdapterRows:
        """The rows with an adapter, given the slots of all rows, [N] int32."""
        if not row_slots.any():
            return NO_ADAPTER_ROWS
        rows = np.flatnonzero(row_slots).astype(np.int32)
        rows = rows[np.argsort(row_slots[rows], kind="stable")]
        slots = row_slots[rows]
        return cls(rows, slots, int(np.count_nonzero(np.diff(slots))) + 1)


NO_ADAPTER_ROWS = AdapterRows(np.empty(0, np.int32), np.empty(0, np.int32), 0)


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """N rows of B sequences; prefill chunks and decodes are end to end.

    Attributes:
        token_ids: [N] int32; −1 − i is the token of choice i of the step before. Only a backend that runs ahead gets
            that, and only while that step is not collected: i counts the ``Wants.choices`` of the last step that was
            launched on the model, in their order. Where that choice has no token, or its row was not finite, nobody
            wants the row's results, but it must not harm others: any token may stand in.
        positions: [N] int32, for the rotary embedding; a KV prefix may shift them relative to the cells.
        cells: [N] int64, where each row's keys and values go: block · block_size + offset.
        query_start: [B + 1] int32, each sequence's first row.
        context_len: [B] int32, cells of each sequence once this step's are written.
        block_tables: [B, longest] int32, padded with 0.
        row_slots: [N] int32, the adapter slot of each row.
        logit_rows: [M] int32, rows whose logits are needed, ascending.
        embeddings: (rows [E] int32, values [E, D] float32): rows that enter the model as values; None for none.
        normed: the same of rows that enter behind the norm of the embeddings, which has no use for their ids and
            positions.
        block_copies: (source, target) blocks to copy before anything else.
        hidden_rows: [H] int32, rows whose final hidden values are wanted, ascending.
        token_types: [N] int32, of models that have them; empty if all are 0.
    """

    token_ids: Ints
    positions: Ints
    cells: Cells
    query_start: Ints
    context_len: Ints
    block_tables: Ints
    row_slots: Ints
    logit_rows: Ints
    embeddings: tuple[Ints, Floats] | None = None
    normed: tuple[Ints, Floats] | None = None
    block_copies: tuple[tuple[int, int], ...] = ()
    hidden_rows: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    token_types: Ints = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def types_of_tokens(self) -> Ints:
        """[N] int32."""
        return self.token_types if self.token_types.size else np.zeros(self.num_rows, np.int32)

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.token_ids.shape[0])


def int32(values: Any) -> Ints:
    """An array of int32."""
    return np.asarray(values, dtype=np.int32)
