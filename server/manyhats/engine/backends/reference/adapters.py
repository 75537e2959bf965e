"""Adapters of the reference backend: each primitive as its docstring states it, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from manyhats.adapters.methods.bottleneck import bottleneck_output
from manyhats.adapters.methods.lora import lora_delta
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    LoweredAdapter,
    LowRank,
)
from manyhats.adapters.sites import Site
from manyhats.engine.backends.batch import AdapterRows
from manyhats.engine.model.architecture import Architecture


class ReferenceSlots:
    """The loaded adapters, by slot, as they were lowered; see ``AdapterSlots``."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        self._adapters: dict[int, LoweredAdapter] = {}
        self._groups = [{group.name: group for group in block.groups()} for block in architecture.blocks]
        self._dtype = dtype

    def write(self, slot: int, adapter: LoweredAdapter) -> None:
        """Puts an adapter into a slot."""
        self._adapters[slot] = adapter

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self._adapters.pop(slot, None)

    def num_bytes(self, slot: int) -> int:
        """Resident bytes of one slot."""
        adapter = self._adapters.get(slot)
        if adapter is None:
            return 0
        values = (getattr(delta, name) for delta in adapter.deltas for name in delta.__slots__)
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))

    def add_deltas(
        self,
        fused: str,
        layer: int,
        x: Tensor,
        y: Tensor,
        rows: AdapterRows,
        linear: Callable[[Tensor], Tensor],
    ) -> None:
        """Each row's own deltas at every part of the fused linear."""
        start = 0
        for member in self._groups[layer][fused].members:
            name, columns = member.name, slice(start, start + member.d_out)
            start = columns.stop
            for row, delta in self._deltas(rows, Site(layer, name)):
                if isinstance(delta, InputScale):
                    y[row, columns] = linear((x[row] * delta.scale.float()).unsqueeze(0))[0, columns]
            for row, delta in self._deltas(rows, Site(layer, name)):
                if isinstance(delta, Affine):
                    scale = 1.0 if delta.scale is None else delta.scale.float()
                    offset = 0.0 if delta.offset is None else delta.offset.float()
                    y[row, columns] = y[row, columns] * scale + offset
            for row, delta in self._deltas(rows, Site(layer, name)):
                if isinstance(delta, LowRank):
                    y[row, columns] += self._low_rank(x[row], delta)

    def add_bottlenecks(
        self, sublayer: str, layer: int, residual: Tensor, output: Tensor, rows: AdapterRows
    ) -> None:
        """Each row's own bottleneck on a sub-layer's output."""
        for row, delta in self._deltas(rows, Site(layer, sublayer)):
            if isinstance(delta, Bottleneck):
                output[row] = bottleneck_output(delta, residual[row], output[row])

    def change_embeddings(self, token_ids: Tensor, hidden: Tensor, rows: AdapterRows) -> None:
        """Each row's own embedding."""
        for row, delta in self._deltas(rows, None):
            token_id = int(token_ids[row])
            if isinstance(delta, EmbeddingLowRank):
                a, b = self._stored(delta.a), self._stored(delta.b)
                hidden[row] += delta.scale * (b @ a[token_id])
            elif isinstance(delta, EmbeddingRows) and token_id in delta.ids.tolist():
                hidden[row] = self._stored(delta.rows)[delta.ids.tolist().index(token_id)]

    def change_logits(self, hidden: Tensor, logits: Tensor, rows: AdapterRows) -> None:
        """Each row's own output head; a head of the adapter's own comes before what changes it."""
        for row, delta in self._deltas(rows, None):
            if isinstance(delta, HeadWeight):
                logits[row] = self._stored(delta.weight) @ hidden[row]
        for row, delta in self._deltas(rows, None):
            if isinstance(delta, HeadRows):
                logits[row, delta.ids] = self._stored(delta.rows) @ hidden[row]
        for row, delta in self._deltas(rows, Site(-1, "lm_head")):
            if isinstance(delta, LowRank):
                logits[row] += self._low_rank(hidden[row], delta)

    def _low_rank(self, x: Tensor, delta: LowRank) -> Tensor:
        return lora_delta(x.unsqueeze(0), self._stored(delta.a), self._stored(delta.b), delta.scale)[0]

    def _stored(self, matrix: Tensor) -> Tensor:
        """A matrix as it is kept: rounded to the slots' dtype."""
        return matrix.to(self._dtype).float()

    def _deltas(self, rows: AdapterRows, site: Site | None) -> Iterator[tuple[int, Delta]]:
        """Each row with each of its adapter's deltas at a site, or with all that have none."""
        for row, slot in zip(rows.rows.tolist(), rows.slots.tolist(), strict=True):
            for delta in self._adapters[slot].deltas:
                if getattr(delta, "site", None) == site:
                    yield row, delta
