"""Loaded adapters for the CPU kernels: one memory each, and tables of where its numbers lie."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
    PrefixGate,
    site_of,
)
from manyhats.adapters.sites import HEAD, PROJECTION, ROUTER, Site
from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters import deltas
from manyhats.engine.backends.cpu.adapters.prefix_table import PrefixEntries, PrefixTable
from manyhats.engine.backends.cpu.adapters.row_tiles import TILE_ROWS
from manyhats.engine.backends.cpu.adapters.tables import (
    AdapterMemory,
    ExpertEntries,
    ExpertTable,
    LinearEntries,
    LinearTable,
    SublayerEntries,
    SublayerTable,
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
from manyhats.engine.backends.cpu.packing import LANES, Array
from manyhats.engine.backends.own_logits import OwnRows, resized
from manyhats.engine.backends.plan import AdapterRows, Ints
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture, LinearShape


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of the base that adapters' tables follow.

    Attributes:
        num_layers: L.
        hidden_size: D.
        sizes: of each group of linears, the outputs of its members.
        places: linear → its group and its place in it.
        stream_places: where bottlenecks act → in how many layers, on rows of which size.
        num_experts: E; 0 for none.
    """

    num_layers: int
    hidden_size: int
    sizes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[str, int]]
    stream_places: Mapping[str, tuple[int, int]]
    num_experts: int = 0

    @classmethod
    def of(cls, architecture: Architecture) -> Layout:
        """The layout of a base; a block may lack some of its groups, and what is outside them is in the first layer."""
        groups = architecture.shared_groups().values()
        sizes = {group.name: tuple(_size(member) for member in group.members) for group in groups}
        places = {name: (group.name, member) for group in groups for member, name in enumerate(group.names)}
        if architecture.embedding.size != architecture.hidden_size:
            sizes[PROJECTION.name] = (architecture.hidden_size,)
            places[PROJECTION.name] = PROJECTION.name, 0
        experts = [block.feed_forward.experts for block in architecture.blocks]
        num_experts = max((each.num for each in experts if each is not None), default=0)
        return cls(
            architecture.num_layers,
            architecture.hidden_size,
            sizes,
            places,
            architecture.stream_places(),
            num_experts,
        )

    def order(self, delta: Delta) -> tuple[int, int]:
        """Deltas sorted by it, those of one site as they were, are in the order in which a step reads them."""
        site, names = site_of(delta), list(self.places)
        if site.name in names:
            return site.layer, names.index(site.name)
        # An expert's linears are read together.
        expert = int(site.name.split(".")[1]) if site.is_of_mixture else 0
        return site.layer, len(names) + expert

    def group_index(self, name: str) -> int:
        """A group's row in the kernel's table."""
        return list(self.sizes).index(name)

    def place_index(self, name: str) -> int:
        """The row of a bottleneck's place in the kernel's table."""
        return list(self.stream_places).index(name)


def padded_size(size: int) -> int:
    """The values of a row of the router's logits: whole lanes, for deltas, whatever the number of experts."""
    return -(-size // LANES) * LANES


def _size(member: LinearShape) -> int:
    return padded_size(member.d_out) if member.name == ROUTER else member.d_out


class PackedAdapter:
    """One adapter's numbers, and where they lie.

    Args:
        layout: of the base.
        num_matrix_values: of all matrices together.
        dtype: of the matrices.

    Attributes:
        vocab_size: of its task; None if that is the base's.
    """

    def __init__(self, layout: Layout, num_matrix_values: int, dtype: torch.dtype) -> None:
        num_layers = layout.num_layers
        self.memory = AdapterMemory(num_matrix_values, dtype)
        self.linears = {group: LinearEntries(num_layers, len(sizes)) for group, sizes in layout.sizes.items()}
        self.sublayers = {name: SublayerEntries(*shape) for name, shape in layout.stream_places.items()}
        self.prefix = PrefixEntries(num_layers)
        self.experts = ExpertEntries(layout.num_experts)
        self.rescales_inputs = False
        self.embeddings: list[EmbeddingChange] = []
        self.heads: list[HeadChange] = []
        self.vocab_size: int | None = None
        self._places = layout.places
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ends = sum(change.num_bytes for change in (*self.embeddings, *self.heads))
        return self.memory.num_bytes + self.experts.num_bytes + ends

    def add(self, delta: Delta) -> None:
        """Copies a delta's numbers.

        Raises:
            ModelError: the kernels cannot run it.
        """
        match delta:
            case LowRank() | Affine() | InputScale() if delta.site == PROJECTION:
                self.add(replace(delta, site=Site(0, PROJECTION.name)))
            case LowRank() if delta.site.name == ROUTER:
                padding = -delta.b.shape[0] % LANES
                padded = replace(delta, b=functional.pad(delta.b, (0, 0, 0, padding)))
                self.linears[ROUTER].add_low_rank(0, padded, self.memory)
            case LowRank() if delta.site.is_of_mixture:
                self.experts.add(delta, self.memory)
            case LowRank() if delta.site.layer >= 0:
                group, member = self._places[delta.site.name]
                self.linears[group].add_low_rank(member, delta, self.memory)
            case LowRank():
                self.heads.append(HeadDelta.of(delta, self._dtype))
            case Affine():
                group, member = self._places[delta.site.name]
                self.linears[group].add_affine(member, delta, self.memory)
            case InputScale():
                group, member = self._places[delta.site.name]
                self.linears[group].add_input_scale(member, delta, self.memory)
                self.rescales_inputs = True
            case Bottleneck():
                if delta.site.name not in self.sublayers:
                    raise ModelError(f"{delta.site}: the base has no such place")
                self.sublayers[delta.site.name].add(delta, self.memory)
            case PrefixGate():
                self.prefix.add(delta, self.memory)
            case EmbeddingLowRank():
                self.embeddings.append(LowRankLookup.of(delta, self._dtype))
            case EmbeddingRows():
                self.embeddings.append(ReplacedRows.of(delta, self._dtype))
            case HeadRows():
                self.heads.append(HeadColumns.of(delta, self._dtype))
            case HeadWeight():
                self.heads.insert(
                    0, OtherHead.of(delta, self._dtype)
                )  # the other changes of a head build upon it
            case _:
                raise ModelError(f"the CPU kernels do not know {type(delta).__name__}")


class CpuAdapterSlots:
    """``AdapterSlots`` on the CPU, where both tiers are one memory: placing an adapter enters its addresses."""

    def __init__(
        self, architecture: Architecture, num_slots: int, dtype: torch.dtype, linear: RunLinear
    ) -> None:
        self._layout = layout = Layout.of(architecture)
        self._linears = {
            group: LinearTable(layout.num_layers, num_slots, list(sizes))
            for group, sizes in layout.sizes.items()
        }
        self._sublayers = {
            name: SublayerTable(num_layers, num_slots, size)
            for name, (num_layers, size) in layout.stream_places.items()
        }
        self._prefixes = PrefixTable(layout.num_layers, num_slots)
        self._experts = ExpertTable(layout.num_layers, num_slots)
        self._linear_rows = np.stack([table.row for table in self._linears.values()])
        self._sublayer_rows = np.stack([table.row for table in self._sublayers.values()])
        self._rescaling = np.zeros(num_slots, dtype=np.bool_)
        self._num_slots = num_slots
        self._linear = linear
        self.dtype = dtype
        self._placing = threading.Lock()
        self.placed: dict[int, PackedAdapter] = {}
        # What few adapters have is looked for slot by slot, and not at all where none has it.
        self._has_embeddings = self._has_heads = False

    @property
    def memory(self) -> None:
        """Placing takes no time."""
        return None

    def pack(self, adapter: LoweredAdapter) -> PackedAdapter:
        """Copies the adapter's numbers into a memory of its own."""
        num_values = sum(_num_matrix_values(delta) for delta in adapter.deltas)
        packed = PackedAdapter(self._layout, num_values, self.dtype)
        packed.vocab_size = adapter.vocab_size
        for delta in sorted(adapter.deltas, key=self._layout.order):
            packed.add(delta)
        return packed

    def place(self, slot: int, packed: PackedAdapter) -> None:
        """Enters its addresses into the tables."""
        with self._placing:
            for group, linears in packed.linears.items():
                self._linears[group].place(slot, linears.fields)
            for name, sublayers in packed.sublayers.items():
                self._sublayers[name].place(slot, sublayers.fields)
            self._prefixes.place(slot, packed.prefix.fields)
            self._experts.place(slot, packed.experts)
            self._rescaling[slot] = packed.rescales_inputs
            self.placed = {**self.placed, slot: packed}
            self._note_rare()

    def clear(self, slot: int) -> None:
        """Takes its addresses out."""
        with self._placing:
            for linear in self._linears.values():
                linear.clear(slot)
            for sublayer in self._sublayers.values():
                sublayer.clear(slot)
            self._prefixes.clear(slot)
            self._experts.clear(slot)
            self.placed = {other: packed for other, packed in self.placed.items() if other != slot}
            self._note_rare()

    def _note_rare(self) -> None:
        placed = self.placed.values()
        self._has_embeddings = any(packed.embeddings for packed in placed)
        self._has_heads = any(packed.heads for packed in placed)

    @property
    def num_scratch_values(self) -> int:
        """Float32 values of scratch that the kernel needs on each thread."""
        rank = max(self._experts.largest_rank, *(table.largest_rank for table in self._linears.values()))
        size = max(table.largest_size for table in self._sublayers.values())
        widest = max(row for _, row in self._layout.stream_places.values())
        return max(TILE_ROWS * rank, 2 * widest + size + LANES)

    def describe(self, rows: AdapterRows, frame: Array) -> tuple[Array, ...]:
        """Enters into a step's frame where the tables are, and which rows have an adapter.

        Returns:
            Arrays whose addresses the frame has, to be kept until the step is over.
        """
        if not rows.rows.size:  # no instruction then looks at a table
            return ()
        own = self._rescaling[rows.slots]
        rescaled_rows, rescaled_slots = rows.rows[own], rows.slots[own]
        tables, used = self._linear_rows.copy(), []
        tiles = _tiles_of(rows.slots)
        if rescaled_rows.size:
            # Not of all slots: others are placed and cleared beside the step, whose threads must count the same shares.
            used = [table.has_input_scales(rescaled_slots) for table in self._linears.values()]
            tables[:, deltas.HAS_INPUT_SCALES] = [each.ctypes.data for each in used]
        frame[col.NUM_SLOTS] = self._num_slots
        frame[col.LINEAR_TABLES] = tables.ctypes.data
        frame[col.SUBLAYER_TABLES] = self._sublayer_rows.ctypes.data
        frame[col.PREFIX_TABLE] = self._prefixes.row.ctypes.data
        frame[col.EXPERT_ENTRIES] = self._experts.addresses.ctypes.data
        frame[col.HAS_EXPERT_ENTRIES] = self._experts.has_entries.ctypes.data
        frame[col.NUM_ADAPTER_ROWS] = rows.rows.size
        frame[col.ADAPTER_ROWS] = rows.rows.ctypes.data
        frame[col.ADAPTER_SLOTS] = rows.slots.ctypes.data
        frame[col.NUM_DELTA_TILES] = tiles.size - 1
        frame[col.DELTA_TILES] = tiles.ctypes.data
        frame[col.NUM_RESCALED_ROWS] = rescaled_rows.size
        frame[col.RESCALED_ROWS] = rescaled_rows.ctypes.data
        frame[col.RESCALED_SLOTS] = rescaled_slots.ctypes.data
        return tables, tiles, rescaled_rows, rescaled_slots, *used

    def change_embeddings(self, token_ids: Tensor, hidden: Tensor, rows: AdapterRows) -> None:
        """Gives each row its own adapter's embedding.

        Args:
            token_ids: [N] int64.
            hidden: [N, D] float32, the base's embeddings before any multiplier, updated.
            rows: which rows have which adapter.
        """
        if self._has_embeddings:
            for slot, indices in rows_by_slot(rows):
                for change in self.placed[slot].embeddings:
                    change.apply(hidden, indices, token_ids[indices], self._linear)

    def rows_with_heads(self, rows: AdapterRows) -> Array:
        """The rows whose adapter changes the output head, int64."""
        if not self._has_heads:
            return np.empty(0, dtype=np.int64)
        found = [own.numpy() for slot, own in rows_by_slot(rows) if self.placed[slot].heads]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def change_logits(self, hidden: Tensor, logits: Tensor, rows: AdapterRows) -> list[OwnRows]:
        """Gives each row its own adapter's output head.

        Args:
            hidden: [M, D] float32, what the head reads.
            logits: [M, V] float32, the base's, before any divisor or cap; updated.
            rows: which of the M rows have which adapter.

        Returns:
            The rows of tasks with a vocabulary of their own, whose logits are apart.
        """
        own: list[OwnRows] = []
        if self._has_heads:
            for slot, indices in rows_by_slot(rows):
                packed = self.placed[slot]
                if packed.vocab_size is not None and packed.heads:
                    values = resized(logits[indices], packed.vocab_size)
                    own.append(OwnRows(indices.numpy(), values))
                    self._change(packed, hidden[indices], values, torch.arange(len(indices)))
                else:
                    self._change(packed, hidden, logits, indices)
        return own

    def _change(self, packed: PackedAdapter, hidden: Tensor, logits: Tensor, rows: Tensor) -> None:
        for change in packed.heads:
            change.apply(hidden, logits, rows, self._linear)


def _tiles_of(slots: Ints) -> Ints:
    """Where tiles of at most ``TILE_ROWS`` rows of one slot begin, of rows sorted by it; then their number."""
    first_of_slot = np.searchsorted(slots, slots)
    begins = (np.arange(slots.size) - first_of_slot) % TILE_ROWS == 0
    return np.append(np.flatnonzero(begins), slots.size).astype(np.int32)


def _num_matrix_values(delta: Delta) -> int:
    """Values that go into an adapter's one buffer of matrices."""
    match delta:
        case LowRank() if delta.site.name == ROUTER:
            return delta.a.numel() + padded_size(delta.b.shape[0]) * delta.rank
        case LowRank() if delta.site != HEAD:
            return delta.a.numel() + delta.b.numel()
        case Bottleneck():
            return delta.down.numel() + delta.up.numel()
    return 0
