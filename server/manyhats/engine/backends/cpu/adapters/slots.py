"""Loaded adapters for the CPU kernels: one memory each, and tables of where its numbers lie."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

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
from manyhats.engine.backends.batch import AdapterRows
from manyhats.engine.backends.cpu.adapters.tables import (
    AdapterMemory,
    LinearTable,
    SublayerTable,
    new_arguments,
)
from manyhats.engine.backends.cpu.adapters.vocabulary import (
    EmbeddingChange,
    HeadChange,
    HeadColumns,
    HeadDelta,
    LowRankLookup,
    OtherHead,
    ReplacedRows,
    RunLinear,
    rows_by_slot,
)
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import SUBLAYERS, Architecture


class CpuAdapterSlots:
    """The loaded adapters, by slot; see ``AdapterSlots``."""

    def __init__(
        self,
        architecture: Architecture,
        num_slots: int,
        dtype: torch.dtype,
        num_threads: int,
        linear: RunLinear,
    ) -> None:
        arguments = new_arguments(dtype, num_threads)
        self._linears: dict[tuple[str, int], LinearTable] = {}
        self._sublayers: dict[tuple[str, int], SublayerTable] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._columns: dict[tuple[str, int], slice] = {}
        for layer, block in enumerate(architecture.blocks):
            for name in SUBLAYERS:
                self._sublayers[name, layer] = SublayerTable(num_slots, block.hidden_size, arguments)
            for group in block.groups():
                sizes = [member.d_out for member in group.members]
                self._linears[group.name, layer] = LinearTable(num_slots, sizes, arguments)
                for part, name in enumerate(group.names):
                    start = sum(sizes[:part])
                    self._places[name] = group.name, part
                    self._columns[group.name, part] = slice(start, start + sizes[part])
        self._linear = linear
        self._writing = threading.Lock()  # two loaders could else replace a table's scratch by a smaller one
        self._dtype = dtype
        self._memories: dict[int, AdapterMemory] = {}
        self._input_scales: dict[tuple[str, int], dict[int, list[tuple[int, Tensor]]]] = {}
        self._embeddings: dict[int, list[EmbeddingChange]] = {}
        self._heads: dict[int, list[HeadChange]] = {}

    def write(self, slot: int, adapter: LoweredAdapter) -> None:
        """Copies the adapter's numbers into a memory of its own and enters them into the tables."""
        memory = AdapterMemory(sum(_num_matrix_values(delta) for delta in adapter.deltas), self._dtype)
        with self._writing:
            for delta in adapter.deltas:
                self._enter(slot, delta, memory)
            self._memories[slot] = memory

    def _enter(self, slot: int, delta: Delta, memory: AdapterMemory) -> None:
        match delta:
            case LowRank() if delta.site.layer >= 0:
                fused, part = self._places[delta.site.name]
                self._linears[fused, delta.site.layer].add_low_rank(slot, part, delta, memory)
            case LowRank():
                self._heads.setdefault(slot, []).append(HeadDelta.of(delta, self._dtype))
            case Affine():
                fused, part = self._places[delta.site.name]
                self._linears[fused, delta.site.layer].add_affine(slot, part, delta, memory)
            case InputScale():
                fused, part = self._places[delta.site.name]
                by_slot = self._input_scales.setdefault((fused, delta.site.layer), {})
                by_slot.setdefault(slot, []).append((part, delta.scale.float()))
            case Bottleneck():
                self._sublayers[delta.site.name, delta.site.layer].add(slot, delta, memory)
            case EmbeddingLowRank():
                self._embeddings.setdefault(slot, []).append(LowRankLookup.of(delta, self._dtype))
            case EmbeddingRows():
                self._embeddings.setdefault(slot, []).append(ReplacedRows.of(delta, self._dtype))
            case HeadRows():
                self._heads.setdefault(slot, []).append(HeadColumns.of(delta, self._dtype))
            case HeadWeight():
                # The other changes of a head build upon it.
                self._heads.setdefault(slot, []).insert(0, OtherHead.of(delta, self._dtype))
            case _:
                raise ModelError(f"the CPU kernels do not know {type(delta).__name__}")

    def clear(self, slot: int) -> None:
        """Frees a slot and its memory."""
        for linear in self._linears.values():
            linear.clear(slot)
        for sublayer in self._sublayers.values():
            sublayer.clear(slot)
        for scales in tuple(self._input_scales.values()):  # a copy: another slot's write may add one
            scales.pop(slot, None)
        self._embeddings.pop(slot, None)
        self._heads.pop(slot, None)
        self._memories.pop(slot, None)

    def num_bytes(self, slot: int) -> int:
        """Resident bytes of one slot."""
        memory = self._memories.get(slot)
        embeddings = sum(change.num_bytes for change in self._embeddings.get(slot, ()))
        heads = sum(change.num_bytes for change in self._heads.get(slot, ()))
        return (0 if memory is None else memory.num_bytes) + embeddings + heads

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
        scales = self._input_scales.get((fused, layer))
        if scales:
            self._rescale_inputs(fused, scales, x, y, rows, linear)
        self._linears[fused, layer].run(x, y, rows)

    def _rescale_inputs(
        self,
        fused: str,
        scales: dict[int, list[tuple[int, Tensor]]],
        x: Tensor,
        y: Tensor,
        rows: AdapterRows,
        linear: Callable[[Tensor], Tensor],
    ) -> None:
        """Runs the linear again for the rows whose input is rescaled, and takes over the part concerned."""
        for slot, indices in rows_by_slot(rows):
            for part, scale in scales.get(slot, ()):
                columns = self._columns[fused, part]
                y[indices, columns] = linear(x[indices] * scale)[:, columns]

    def add_bottlenecks(
        self, sublayer: str, layer: int, residual: Tensor, output: Tensor, rows: AdapterRows
    ) -> None:
        """Each row's own bottleneck on a sub-layer's output."""
        self._sublayers[sublayer, layer].run(residual, output, rows)

    def change_embeddings(self, token_ids: Tensor, hidden: Tensor, rows: AdapterRows) -> None:
        """Each row's own embedding."""
        if self._embeddings:
            for slot, indices in rows_by_slot(rows):
                for change in self._embeddings.get(slot, ()):
                    change.apply(hidden, indices, token_ids[indices], self._linear)

    def change_logits(self, hidden: Tensor, logits: Tensor, rows: AdapterRows) -> None:
        """Each row's own output head."""
        if self._heads:
            for slot, indices in rows_by_slot(rows):
                for change in self._heads.get(slot, ()):
                    change.apply(hidden, logits, indices, self._linear)


def _num_matrix_values(delta: Delta) -> int:
    """Values that go into an adapter's one buffer of matrices."""
    match delta:
        case LowRank() if delta.site.layer >= 0:
            return delta.a.numel() + delta.b.numel()
        case Bottleneck():
            return delta.down.numel() + delta.up.numel()
    return 0
