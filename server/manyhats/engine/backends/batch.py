"""The tensors of one step: every token of every scheduled sequence, prefill chunks and decodes together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_TILE = 16
"""Query rows of one sequence that attention takes as one unit of work."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRows:
    """The rows of a batch that have an adapter, those of one adapter side by side.

    Attributes:
        rows: [M] int32, indices of rows.
        slots: [M] int32, the adapter slot of each; never 0, the base model's.
        num_adapters: distinct slots.
    """

    rows: Tensor
    slots: Tensor
    num_adapters: int


NO_ADAPTER_ROWS = AdapterRows(
    rows=torch.empty(0, dtype=torch.int32), slots=torch.empty(0, dtype=torch.int32), num_adapters=0
)
"""Every row is the base model's."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step as the decoder reads it; N tokens of B sequences.

    Attributes:
        token_ids: [N] int64.
        positions: [N] int64, for the rotary embedding; a KV prefix may shift them against KV slots.
        slot_mapping: [N] int64, where each token's keys and values go: block · block_size + offset.
        query_start: [B + 1] int32, each sequence's first row.
        context_len: [B] int32, KV positions of each sequence once this step's are written.
        block_tables: [B, longest] int32, padded with 0.
        tiles: [T, 3] int32, units of attention: sequence, first query row within it, number of rows.
        adapter_rows: rows with an adapter.
        logit_rows: [M] int64, rows whose logits are needed, in order.
        logit_adapter_rows: those of them with an adapter, as indices into ``logit_rows``.
        embeddings: (rows, values): rows [E] int64 that enter the decoder as values [E, D]; None for none.
        block_copies: (source, target) blocks to copy before anything else.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_len: Tensor
    block_tables: Tensor
    tiles: Tensor
    adapter_rows: AdapterRows
    logit_rows: Tensor
    logit_adapter_rows: AdapterRows = NO_ADAPTER_ROWS
    embeddings: tuple[Tensor, Tensor] | None = None
    block_copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.token_ids.shape[0])
