"""Where loaded adapters' numbers lie, for the kernel: per place in the decoder, one row a layer and slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Gate,
    InputScale,
    LowRank,
)
from manyhats.engine.backends.cpu.adapters import bottleneck, deltas, expert_deltas
from manyhats.engine.backends.cpu.packing import LANES, Array, as_array, pack_columns, pack_rows
from manyhats.engine.errors import ModelError


class AdapterMemory:
    """The matrices and vectors of one loaded adapter, and the addresses that tables hold.

    Args:
        num_values: of all matrices together; they lie in one buffer.
        dtype: of matrices; vectors are float32.
    """

    def __init__(self, num_values: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._values = as_array(torch.empty(num_values, dtype=dtype))
        self._address = int(self._values.ctypes.data)
        self._used = 0
        self._vectors: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        vectors = sum(vector.numel() * 4 for vector in self._vectors)
        return self._values.nbytes + vectors

    def add_low_rank(self, a: Tensor, b: Tensor) -> tuple[int, int]:
        """Packs A [R, d_in] and B [d_out, R] to the next free places, and returns their addresses."""
        return self._add(a, pack_rows), self._add(b, pack_columns)

    def _add(self, matrix: Tensor, pack: Callable[[Array, Array], None]) -> int:
        begin, end = self._used, self._used + matrix.numel()
        pack(as_array(matrix.to(self._dtype)), self._values[begin:end])
        self._used = end
        return self._address + begin * self._values.itemsize

    def add_vector(self, vector: Tensor) -> int:
        """Copies a vector as float32, padded with zeros to whole lanes, and returns its address."""
        padded = torch.zeros(-(-vector.numel() // LANES) * LANES)
        padded[: vector.numel()] = vector.reshape(-1)
        self._vectors.append(padded)
        return padded.data_ptr()


Fields = Mapping[int, npt.NDArray[Any]]
"""What stands in some columns of the kernel's table: layer by layer, and by slot where there are any."""

_LINEAR_FIELDS = {
    deltas.A_ADDRESS: np.int64,
    deltas.B_ADDRESS: np.int64,
    deltas.RANKS: np.int32,
    deltas.SCALES: np.float32,
    deltas.SCALE_ADDRESS: np.int64,
    deltas.OFFSET_ADDRESS: np.int64,
    deltas.INPUT_SCALE_ADDRESS: np.int64,
    deltas.GATE_ADDRESS: np.int64,
}


def gate_addresses(gate: Gate, memory: AdapterMemory) -> list[int]:
    """Where each of a gate's vectors lies, followed by its bias."""
    parts = zip(gate.weight, gate.bias, strict=True)
    return [memory.add_vector(torch.cat((weight.float(), bias.float()[None]))) for weight, bias in parts]


class LinearEntries:
    """What one adapter does at one group of linears, layer by layer and member by member.

    Args:
        num_layers: L.
        num_members: linears of the group.
    """

    def __init__(self, num_layers: int, num_members: int) -> None:
        shape = (num_layers, num_members)
        self.fields: Fields = {column: np.zeros(shape, dtype) for column, dtype in _LINEAR_FIELDS.items()}

    def add_low_rank(self, member: int, delta: LowRank, memory: AdapterMemory) -> None:
        """Enters a low-rank delta.

        Raises:
            ModelError: the member has one already, or its dimensions do not fit the kernels' lanes.
        """
        at = delta.site.layer, member
        if self.fields[deltas.RANKS][at]:
            raise ModelError(f"{delta.site}: one low-rank delta a site, not two")
        a, b = _add_low_rank(delta, memory)
        self.fields[deltas.A_ADDRESS][at], self.fields[deltas.B_ADDRESS][at] = a, b
        self.fields[deltas.SCALES][at] = delta.scale
        self.fields[deltas.RANKS][at] = delta.rank
        self._add_gate(at, delta, memory)

    def add_affine(self, member: int, delta: Affine, memory: AdapterMemory) -> None:
        """Enters a scale and an offset.

        Raises:
            ModelError: the member has them already.
        """
        at = delta.site.layer, member
        if self.fields[deltas.SCALE_ADDRESS][at] or self.fields[deltas.OFFSET_ADDRESS][at]:
            raise ModelError(f"{delta.site}: one scale and offset a site, not two")
        if delta.scale is not None:
            self.fields[deltas.SCALE_ADDRESS][at] = memory.add_vector(delta.scale)
        if delta.offset is not None:
            self.fields[deltas.OFFSET_ADDRESS][at] = memory.add_vector(delta.offset)
        self._add_gate(at, delta, memory)

    def _add_gate(self, at: tuple[int, int], delta: LowRank | Affine, memory: AdapterMemory) -> None:
        if delta.gate is None:
            return
        if self.fields[deltas.GATE_ADDRESS][at]:
            raise ModelError(f"{delta.site}: one gate a site, not two")
        (self.fields[deltas.GATE_ADDRESS][at],) = gate_addresses(delta.gate, memory)

    def add_input_scale(self, member: int, delta: InputScale, memory: AdapterMemory) -> None:
        """Enters a scale of the input.

        Raises:
            ModelError: the member has one already.
        """
        addresses, at = self.fields[deltas.INPUT_SCALE_ADDRESS], (delta.site.layer, member)
        if addresses[at]:
            raise ModelError(f"{delta.site}: one scale of the input a site, not two")
        addresses[at] = memory.add_vector(delta.scale)


class ExpertEntries:
    """What one adapter does at experts: entries [E · linears, columns] for each layer that has any.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.layers: dict[int, npt.NDArray[np.int64]] = {}
        self.largest_rank = 0
        self._num_rows = num_experts * len(expert_deltas.MEMBERS)

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return sum(entries.nbytes for entries in self.layers.values())

    def add(self, delta: LowRank, memory: AdapterMemory) -> None:
        """Enters a low-rank delta of an expert's linear.

        Raises:
            ModelError: the linear has one already, or its dimensions do not fit the kernels' lanes.
        """
        _, expert, name = delta.site.name.split(".")
        entries = self.layers.setdefault(
            delta.site.layer, np.zeros((self._num_rows, expert_deltas.NUM_COLUMNS), dtype=np.int64)
        )
        at = int(expert) * len(expert_deltas.MEMBERS) + expert_deltas.MEMBERS.index(name)
        if entries[at, expert_deltas.RANK]:
            raise ModelError(f"{delta.site}: one low-rank delta a site, not two")
        a, b = _add_low_rank(delta, memory)
        entries[at, expert_deltas.A_ADDRESS], entries[at, expert_deltas.B_ADDRESS] = a, b
        entries[at, expert_deltas.RANK] = delta.rank
        entries.view(np.float32)[at, 2 * expert_deltas.SCALE] = delta.scale
        self.largest_rank = max(self.largest_rank, delta.rank)


class ExpertTable:
    """The addresses of adapters' entries at experts, by layer and slot; 0 for none.

    Attributes:
        largest_rank: ever placed.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.addresses = np.zeros((num_layers, num_slots), dtype=np.int64)
        self.has_entries = np.zeros(num_layers, dtype=np.uint8)
        self.largest_rank = 0

    def place(self, slot: int, experts: ExpertEntries) -> None:
        """Enters what an adapter does at experts."""
        self.largest_rank = max(self.largest_rank, experts.largest_rank)
        for layer in range(len(self.addresses)):
            entries = experts.layers.get(layer)
            self.addresses[layer, slot] = 0 if entries is None else entries.ctypes.data
        self.has_entries[:] = self.addresses.any(axis=1)

    def clear(self, slot: int) -> None:
        """Takes a slot's entries out."""
        self.addresses[:, slot] = 0
        self.has_entries[:] = self.addresses.any(axis=1)


def _add_low_rank(delta: LowRank, memory: AdapterMemory) -> tuple[int, int]:
    """Packs its matrices, and returns their addresses.

    Raises:
        ModelError: its dimensions do not fit the kernels' lanes.
    """
    if delta.a.shape[1] % LANES or delta.b.shape[0] % LANES:
        raise ModelError(f"{delta.site}: the CPU kernels need dimensions that are multiples of {LANES}")
    return memory.add_low_rank(delta.a, delta.b)


class SlotTable(ABC):
    """The entries of one place, by slot. ``place`` and ``clear`` are called one at a time, beside steps."""

    def __init__(self, empty: Fields, num_slots: int) -> None:
        self._fields = {
            column: np.zeros((field.shape[0], num_slots, *field.shape[1:]), field.dtype)
            for column, field in empty.items()
        }

    def place(self, slot: int, fields: Fields) -> None:
        """Enters what an adapter does here."""
        for column, field in fields.items():
            self._fields[column][:, slot] = field
        self._note_used()

    def clear(self, slot: int) -> None:
        """Takes a slot's entries out."""
        for field in self._fields.values():
            field[:, slot] = 0
        self._note_used()

    @abstractmethod
    def _note_used(self) -> None:
        """Note which layers have entries."""

    def _addresses(self, num_columns: int, more: Fields) -> npt.NDArray[np.int64]:
        addresses = np.zeros(num_columns, dtype=np.int64)
        for column, field in {**self._fields, **more}.items():
            addresses[column] = field.ctypes.data
        return addresses


class LinearTable(SlotTable):
    """Of one group of linears in all layers: input scales, scales, offsets and low-rank deltas.

    Attributes:
        row: [columns] int64, of the kernel's table.
        largest_rank: ever placed.
    """

    def __init__(self, num_layers: int, num_slots: int, sizes: list[int]) -> None:
        super().__init__(LinearEntries(num_layers, len(sizes)).fields, num_slots)
        self._starts = np.array([sum(sizes[:member]) for member in range(len(sizes))], dtype=np.int32)
        self._sizes = np.array(sizes, dtype=np.int32)
        self._has_deltas = np.zeros(num_layers, dtype=np.uint8)
        self._has_gates = np.zeros(num_layers, dtype=np.uint8)
        self.largest_rank = 0
        self.row = self._addresses(
            deltas.NUM_COLUMNS,
            {
                deltas.STARTS: self._starts,
                deltas.SIZES: self._sizes,
                deltas.HAS_DELTAS: self._has_deltas,
                deltas.HAS_GATES: self._has_gates,
            },
        )
        self.row[deltas.NUM_MEMBERS] = len(sizes)

    def has_input_scales(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """[L, members]: where any of these slots rescales an input."""
        addresses = self._fields[deltas.INPUT_SCALE_ADDRESS][:, slots]
        return np.ascontiguousarray(addresses.any(axis=1).astype(np.uint8))

    def _note_used(self) -> None:
        fields = self._fields
        self.largest_rank = max(self.largest_rank, int(fields[deltas.RANKS].max()))
        used = fields[deltas.RANKS] | fields[deltas.SCALE_ADDRESS] | fields[deltas.OFFSET_ADDRESS]
        self._has_deltas[:] = used.any(axis=(1, 2))
        self._has_gates[:] = fields[deltas.GATE_ADDRESS].any(axis=(1, 2))


_INPUTS = {
    None: bottleneck.NOTHING,
    BottleneckInput.OUTPUT: bottleneck.OUTPUT,
    BottleneckInput.SUM: bottleneck.SUM,
    BottleneckInput.RESIDUAL: bottleneck.RESIDUAL,
    BottleneckInput.NORMED: bottleneck.NORMED,
}


_SUBLAYER_FIELDS = {
    bottleneck.ADDRESSES: (bottleneck.NUM_ADDRESSES, np.int64),
    bottleneck.INTEGERS: (bottleneck.NUM_INTEGERS, np.int32),
    bottleneck.NUMBERS: (bottleneck.NUM_NUMBERS, np.float32),
}


class SublayerEntries:
    """One adapter's bottlenecks at one kind of sub-layer, layer by layer.

    Args:
        num_layers: L.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self.fields: Fields = {
            column: np.zeros((num_layers, size), dtype) for column, (size, dtype) in _SUBLAYER_FIELDS.items()
        }
        self._hidden_size = hidden_size

    def add(self, delta: Bottleneck, memory: AdapterMemory) -> None:
        """Enters a bottleneck.

        Raises:
            ModelError: the layer has one already, or the kernel does not know its activation.
        """
        addresses, integers, numbers = (self.fields[column][delta.site.layer] for column in _SUBLAYER_FIELDS)
        if integers[bottleneck.SIZE]:
            raise ModelError(f"{delta.site}: one bottleneck a site, not two")
        if delta.activation not in bottleneck.ACTIVATIONS:
            raise ModelError(f"{delta.site}: the CPU kernels do not know the activation {delta.activation!r}")
        addresses[bottleneck.DOWN], addresses[bottleneck.UP] = memory.add_low_rank(delta.down, delta.up)
        addresses[bottleneck.DOWN_BIAS] = memory.add_vector(delta.down_bias)
        addresses[bottleneck.UP_BIAS] = memory.add_vector(delta.up_bias)
        addresses[bottleneck.SCALE] = memory.add_vector(delta.scale.expand(self._hidden_size))
        for norm, weight, eps in (
            (delta.norm_before, bottleneck.BEFORE_WEIGHT, bottleneck.BEFORE_EPS),
            (delta.norm_after, bottleneck.AFTER_WEIGHT, bottleneck.AFTER_EPS),
        ):
            if norm is not None:
                addresses[weight] = memory.add_vector(norm.weight)
                addresses[weight + 1] = memory.add_vector(norm.bias)
                numbers[eps] = norm.eps
        if delta.gate is not None:
            (addresses[bottleneck.GATE],) = gate_addresses(delta.gate, memory)
        numbers[bottleneck.KEEP] = delta.keep
        # Where the norm of the stream is skipped, the kernel leaves the stream itself, r + m'.
        numbers[bottleneck.CARRY] = delta.carry + float(delta.skips_norm)
        numbers[bottleneck.CARRY_NORMED] = delta.carry_normed
        integers[bottleneck.ACTIVATION] = bottleneck.ACTIVATIONS.index(delta.activation)
        integers[bottleneck.INPUT] = _INPUTS[delta.input]
        integers[bottleneck.NORM_RESIDUAL] = _INPUTS[delta.norm_residual]
        integers[bottleneck.SKIPS_NORM] = delta.skips_norm
        if delta.ends is not None:
            integers[bottleneck.HAS_ENDS] = True
            integers[bottleneck.FIRST], integers[bottleneck.LAST] = delta.ends.first, delta.ends.last
            integers[bottleneck.IS_SPLIT] = delta.ends.is_split
        integers[bottleneck.SIZE] = int(delta.down.shape[0])


class SublayerTable(SlotTable):
    """Of one kind of sub-layer in all layers: bottleneck adapters.

    Attributes:
        row: [columns] int64, of the kernel's table.
        largest_size: ever placed.
    """

    def __init__(self, num_layers: int, num_slots: int, hidden_size: int) -> None:
        super().__init__(SublayerEntries(num_layers, hidden_size).fields, num_slots)
        self._has_bottlenecks = np.zeros(num_layers, dtype=np.uint8)
        self._has_skips = np.zeros(num_layers, dtype=np.uint8)
        self._has_gates = np.zeros(num_layers, dtype=np.uint8)
        self.largest_size = 0
        self.row = self._addresses(
            bottleneck.NUM_TABLE_COLUMNS,
            {
                bottleneck.HAS_BOTTLENECKS: self._has_bottlenecks,
                bottleneck.HAS_SKIPS: self._has_skips,
                bottleneck.HAS_GATES: self._has_gates,
            },
        )

    def _note_used(self) -> None:
        sizes = self._fields[bottleneck.INTEGERS][:, :, bottleneck.SIZE]
        self.largest_size = max(self.largest_size, int(sizes.max()))
        self._has_bottlenecks[:] = sizes.any(axis=1)
        self._has_skips[:] = self._fields[bottleneck.INTEGERS][:, :, bottleneck.SKIPS_NORM].any(axis=1)
        self._has_gates[:] = self._fields[bottleneck.ADDRESSES][:, :, bottleneck.GATE].any(axis=1)
