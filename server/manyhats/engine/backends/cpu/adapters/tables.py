"""Where loaded adapters' numbers lie, for the kernels: per place in the decoder, one row a slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import Affine, Bottleneck, BottleneckInput, LowRank
from manyhats.engine.backends.cpu.adapters import bottleneck as bottleneck_kernels
from manyhats.engine.backends.cpu.adapters.affine import affine
from manyhats.engine.backends.cpu.adapters.low_rank import low_rank
from manyhats.engine.backends.cpu.packing import LANES, Array, as_array, pack_low_rank
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.errors import ModelError


class AdapterMemory:
    """The matrices and vectors of one loaded adapter, and the addresses that tables hold.

    Args:
        num_values: of all matrices together; they lie in one buffer.
        dtype: of matrices; vectors are float32.
    """

    def __init__(self, num_values: int, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(num_values, dtype=dtype)
        self._used = 0
        self._vectors: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        vectors = sum(vector.numel() * 4 for vector in self._vectors)
        return self._buffer.numel() * self._buffer.element_size() + vectors

    def add_matrix(self, matrix: Tensor) -> int:
        """Copies a matrix to the next free place, row by row, and returns its address."""
        end = self._used + matrix.numel()
        target = self._buffer[self._used : end]
        target.copy_(matrix.reshape(-1))
        self._used = end
        return target.data_ptr()

    def add_vector(self, vector: Tensor) -> int:
        """Copies a vector as float32, padded with zeros to whole lanes, and returns its address."""
        padded = torch.zeros(-(-vector.numel() // LANES) * LANES)
        padded[: vector.numel()] = vector.reshape(-1)
        self._vectors.append(padded)
        return padded.data_ptr()


@dataclass(frozen=True, slots=True, eq=False)
class KernelArguments:
    """What every table hands to its kernel beside its own rows.

    Attributes:
        like: an empty array of the matrices' dtype. f32: an empty float32 array.
        num_threads: of the kernels.
    """

    like: Array
    f32: Array
    num_threads: int


class LinearEntries:
    """What one adapter does at one group of linears, layer by layer and member by member.

    Args:
        num_layers: L.
        num_members: linears of the group.
    """

    def __init__(self, num_layers: int, num_members: int) -> None:
        shape = (num_layers, num_members)
        self.a_address = np.zeros(shape, dtype=np.int64)
        self.b_address = np.zeros(shape, dtype=np.int64)
        self.ranks = np.zeros(shape, dtype=np.int32)
        self.scales = np.zeros(shape, dtype=np.float32)
        self.scale_address = np.zeros(shape, dtype=np.int64)
        self.offset_address = np.zeros(shape, dtype=np.int64)

    def add_low_rank(self, member: int, delta: LowRank, memory: AdapterMemory) -> None:
        """Enters a low-rank delta.

        Raises:
            ModelError: the member has one already, or its dimensions do not fit the kernels' lanes.
        """
        at = delta.site.layer, member
        if self.ranks[at]:
            raise ModelError(f"{delta.site}: one low-rank delta a site, not two")
        if delta.a.shape[1] % LANES or delta.b.shape[0] % LANES:
            raise ModelError(f"{delta.site}: the CPU kernels need dimensions that are multiples of {LANES}")
        a, b = pack_low_rank(delta.a, delta.b)
        self.a_address[at] = memory.add_matrix(a)
        self.b_address[at] = memory.add_matrix(b)
        self.scales[at] = delta.scale
        self.ranks[at] = delta.rank

    def add_affine(self, member: int, delta: Affine, memory: AdapterMemory) -> None:
        """Enters a scale and an offset.

        Raises:
            ModelError: the member has them already.
        """
        at = delta.site.layer, member
        if self.scale_address[at] or self.offset_address[at]:
            raise ModelError(f"{delta.site}: one scale and offset a site, not two")
        if delta.scale is not None:
            self.scale_address[at] = memory.add_vector(delta.scale)
        if delta.offset is not None:
            self.offset_address[at] = memory.add_vector(delta.offset)


_LINEAR_FIELDS = ("a_address", "b_address", "ranks", "scales", "scale_address", "offset_address")


class LinearTable:
    """Of one group of linears in all layers: low-rank deltas, scales and offsets, by slot and member.

    ``place`` and ``clear`` are called one at a time, beside ``run``.
    """

    def __init__(self, num_layers: int, num_slots: int, sizes: list[int], arguments: KernelArguments) -> None:
        empty = LinearEntries(num_layers, len(sizes))
        shape = (num_layers, num_slots, len(sizes))
        self._fields = {name: np.zeros(shape, getattr(empty, name).dtype) for name in _LINEAR_FIELDS}
        self._columns = np.array([sum(sizes[:member]) for member in range(len(sizes))], dtype=np.int32)
        self._sizes = np.array(sizes, dtype=np.int32)
        self._arguments = arguments
        self._scratch = np.empty((arguments.num_threads, 64), dtype=np.float32)
        self._has_low_rank = [False] * num_layers
        self._has_affine = [False] * num_layers

    def place(self, slot: int, entries: LinearEntries) -> None:
        """Enters what an adapter does here."""
        largest = int(entries.ranks.max())
        if largest > self._scratch.shape[1]:
            self._scratch = np.empty((self._arguments.num_threads, largest), dtype=np.float32)
        for name, field in self._fields.items():
            field[:, slot] = getattr(entries, name)
        self._note_used()

    def clear(self, slot: int) -> None:
        """Takes a slot's entries out."""
        for name in ("ranks", "scale_address", "offset_address"):
            self._fields[name][:, slot] = 0
        self._note_used()

    def _note_used(self) -> None:
        """Which layers need a kernel at all."""
        fields = self._fields
        self._has_low_rank = [bool(layer.any()) for layer in fields["ranks"]]
        addresses = fields["scale_address"] | fields["offset_address"]
        self._has_affine = [bool(layer.any()) for layer in addresses]

    def run(self, layer: int, x: Tensor, y: Tensor, rows: AdapterRows) -> None:
        """Rescales and shifts y, then adds the low-rank deltas; see ``Deltas.add_deltas``."""
        arguments, fields = self._arguments, self._fields
        if self._has_affine[layer]:
            affine(
                y.numpy(),
                rows.rows,
                rows.slots,
                fields["scale_address"][layer],
                fields["offset_address"][layer],
                self._columns,
                self._sizes,
                arguments.f32,
                arguments.num_threads,
            )
        if self._has_low_rank[layer]:
            low_rank(
                x.numpy(),
                y.numpy(),
                rows.rows,
                rows.slots,
                fields["a_address"][layer],
                fields["b_address"][layer],
                fields["ranks"][layer],
                fields["scales"][layer],
                self._columns,
                self._sizes,
                arguments.like,
                self._scratch,
            )


_INPUTS = {
    None: bottleneck_kernels.NOTHING,
    BottleneckInput.OUTPUT: bottleneck_kernels.OUTPUT,
    BottleneckInput.SUM: bottleneck_kernels.SUM,
    BottleneckInput.RESIDUAL: bottleneck_kernels.RESIDUAL,
}


class SublayerEntries:
    """One adapter's bottlenecks at one kind of sub-layer, layer by layer.

    Args:
        num_layers: L.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self.addresses = np.zeros((num_layers, bottleneck_kernels.NUM_ADDRESSES), dtype=np.int64)
        self.integers = np.zeros((num_layers, bottleneck_kernels.NUM_INTEGERS), dtype=np.int32)
        self.numbers = np.zeros((num_layers, bottleneck_kernels.NUM_NUMBERS), dtype=np.float32)
        self._hidden_size = hidden_size

    def add(self, delta: Bottleneck, memory: AdapterMemory) -> None:
        """Enters a bottleneck.

        Raises:
            ModelError: the layer has one already, or the kernel does not know its activation.
        """
        kernels, layer = bottleneck_kernels, delta.site.layer
        addresses, integers, numbers = self.addresses[layer], self.integers[layer], self.numbers[layer]
        if integers[kernels.SIZE]:
            raise ModelError(f"{delta.site}: one bottleneck a site, not two")
        if delta.activation not in kernels.ACTIVATIONS:
            raise ModelError(f"{delta.site}: the CPU kernels do not know the activation {delta.activation!r}")
        down, up = pack_low_rank(delta.down, delta.up)
        addresses[kernels.DOWN] = memory.add_matrix(down)
        addresses[kernels.UP] = memory.add_matrix(up)
        addresses[kernels.DOWN_BIAS] = memory.add_vector(delta.down_bias)
        addresses[kernels.UP_BIAS] = memory.add_vector(delta.up_bias)
        addresses[kernels.SCALE] = memory.add_vector(delta.scale.expand(self._hidden_size))
        for norm, weight, eps in (
            (delta.norm_before, kernels.BEFORE_WEIGHT, kernels.BEFORE_EPS),
            (delta.norm_after, kernels.AFTER_WEIGHT, kernels.AFTER_EPS),
        ):
            if norm is not None:
                addresses[weight] = memory.add_vector(norm.weight)
                addresses[weight + 1] = memory.add_vector(norm.bias)
                numbers[eps] = norm.eps
        numbers[kernels.KEEP] = delta.keep
        numbers[kernels.CARRY] = delta.carry
        integers[kernels.ACTIVATION] = kernels.ACTIVATIONS.index(delta.activation)
        integers[kernels.INPUT] = _INPUTS[delta.input]
        integers[kernels.NORM_RESIDUAL] = _INPUTS[delta.norm_residual]
        integers[kernels.SIZE] = int(delta.down.shape[0])


class SublayerTable:
    """Of one kind of sub-layer in all layers: bottleneck adapters, by slot; used as ``LinearTable`` is."""

    def __init__(self, num_layers: int, num_slots: int, hidden_size: int, arguments: KernelArguments) -> None:
        shape = (num_layers, num_slots)
        self._addresses = np.zeros((*shape, bottleneck_kernels.NUM_ADDRESSES), dtype=np.int64)
        self._integers = np.zeros((*shape, bottleneck_kernels.NUM_INTEGERS), dtype=np.int32)
        self._numbers = np.zeros((*shape, bottleneck_kernels.NUM_NUMBERS), dtype=np.float32)
        self._hidden_size = hidden_size
        self._arguments = arguments
        self._scratch = self._new_scratch(64)
        self._is_used = [False] * num_layers

    def _new_scratch(self, size: int) -> Array:
        width = 2 * self._hidden_size + -(-size // LANES) * LANES
        return np.empty((self._arguments.num_threads, width), dtype=np.float32)

    def place(self, slot: int, entries: SublayerEntries) -> None:
        """Enters an adapter's bottlenecks."""
        largest = int(entries.integers[:, bottleneck_kernels.SIZE].max())
        if 2 * self._hidden_size + largest > self._scratch.shape[1]:
            self._scratch = self._new_scratch(largest)
        self._addresses[:, slot] = entries.addresses
        self._numbers[:, slot] = entries.numbers
        self._integers[:, slot] = entries.integers
        self._note_used()

    def clear(self, slot: int) -> None:
        """Takes a slot's bottlenecks out."""
        self._integers[:, slot, bottleneck_kernels.SIZE] = 0
        self._note_used()

    def _note_used(self) -> None:
        self._is_used = [bool(layer.any()) for layer in self._integers[:, :, bottleneck_kernels.SIZE]]

    def run(self, layer: int, residual: Tensor, output: Tensor, rows: AdapterRows) -> None:
        """Gives each row its own bottleneck; see ``Deltas.add_bottlenecks``."""
        if self._is_used[layer]:
            bottleneck_kernels.bottleneck(
                residual.numpy(),
                output.numpy(),
                rows.rows,
                rows.slots,
                self._addresses[layer],
                self._integers[layer],
                self._numbers[layer],
                self._arguments.like,
                self._arguments.f32,
                self._scratch,
            )


def new_arguments(dtype: torch.dtype, num_threads: int) -> KernelArguments:
    """Arguments for matrices kept in ``dtype``."""
    return KernelArguments(
        like=as_array(torch.empty(1, dtype=dtype)), f32=np.empty(1, dtype=np.float32), num_threads=num_threads
    )
