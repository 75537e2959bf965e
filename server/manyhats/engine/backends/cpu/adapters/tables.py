"""Where loaded adapters' numbers lie, for the kernels: per place in the decoder, one row a slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import Affine, Bottleneck, BottleneckInput, LayerNorm, LowRank
from manyhats.engine.backends.batch import AdapterRows
from manyhats.engine.backends.cpu.adapters import bottleneck as bottleneck_kernels
from manyhats.engine.backends.cpu.adapters.affine import affine
from manyhats.engine.backends.cpu.adapters.low_rank import low_rank
from manyhats.engine.backends.cpu.packing import LANES, Array, as_array, pack_low_rank
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


class LinearTable:
    """Of one fused linear of one layer: low-rank deltas, scales and offsets, by slot and part."""

    def __init__(self, num_slots: int, sizes: list[int], arguments: KernelArguments) -> None:
        shape = (num_slots, len(sizes))
        self._a_address = np.zeros(shape, dtype=np.int64)
        self._b_address = np.zeros(shape, dtype=np.int64)
        self._ranks = np.zeros(shape, dtype=np.int32)
        self._scales = np.zeros(shape, dtype=np.float32)
        self._scale_address = np.zeros(shape, dtype=np.int64)
        self._offset_address = np.zeros(shape, dtype=np.int64)
        self._columns = np.array([sum(sizes[:part]) for part in range(len(sizes))], dtype=np.int32)
        self._sizes = np.array(sizes, dtype=np.int32)
        self._arguments = arguments
        self._scratch = np.empty((arguments.num_threads, 64), dtype=np.float32)
        # Sets, not counts: threads that write and clear other slots change them at the same time.
        self._with_low_rank: set[tuple[int, int]] = set()
        self._with_affine: set[tuple[int, int]] = set()

    def add_low_rank(self, slot: int, part: int, delta: LowRank, memory: AdapterMemory) -> None:
        """Enters a low-rank delta.

        Raises:
            ModelError: the part has one already, or its dimensions do not fit the kernels' lanes.
        """
        if self._ranks[slot, part]:
            raise ModelError(f"{delta.site}: one low-rank delta a site, not two")
        if delta.a.shape[1] % LANES or delta.b.shape[0] % LANES:
            raise ModelError(f"{delta.site}: the CPU kernels need dimensions that are multiples of {LANES}")
        a, b = pack_low_rank(delta.a, delta.b)
        self._a_address[slot, part] = memory.add_matrix(a)
        self._b_address[slot, part] = memory.add_matrix(b)
        self._scales[slot, part] = delta.scale
        self._ranks[slot, part] = delta.rank
        if delta.rank > self._scratch.shape[1]:
            self._scratch = np.empty((self._arguments.num_threads, delta.rank), dtype=np.float32)
        self._with_low_rank.add((slot, part))

    def add_affine(self, slot: int, part: int, delta: Affine, memory: AdapterMemory) -> None:
        """Enters a scale and an offset.

        Raises:
            ModelError: the part has them already.
        """
        if self._scale_address[slot, part] or self._offset_address[slot, part]:
            raise ModelError(f"{delta.site}: one scale and offset a site, not two")
        if delta.scale is not None:
            self._scale_address[slot, part] = memory.add_vector(delta.scale)
        if delta.offset is not None:
            self._offset_address[slot, part] = memory.add_vector(delta.offset)
        self._with_affine.add((slot, part))

    def clear(self, slot: int) -> None:
        """Takes a slot's entries out."""
        for part in range(len(self._sizes)):
            self._with_low_rank.discard((slot, part))
            self._with_affine.discard((slot, part))
        self._ranks[slot] = 0
        self._scale_address[slot] = 0
        self._offset_address[slot] = 0

    def run(self, x: Tensor, y: Tensor, rows: AdapterRows) -> None:
        """Rescales and shifts y, then adds the low-rank deltas; see ``AdapterSlots.add_deltas``."""
        arguments = self._arguments
        row_indices, row_slots = rows.rows.numpy(), rows.slots.numpy()
        if self._with_affine:
            affine(
                y.numpy(),
                row_indices,
                row_slots,
                self._scale_address,
                self._offset_address,
                self._columns,
                self._sizes,
                arguments.f32,
                arguments.num_threads,
            )
        if self._with_low_rank:
            low_rank(
                x.numpy(),
                y.numpy(),
                row_indices,
                row_slots,
                self._a_address,
                self._b_address,
                self._ranks,
                self._scales,
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


class SublayerTable:
    """Of one sub-layer's output: bottleneck adapters, by slot."""

    def __init__(self, num_slots: int, hidden_size: int, arguments: KernelArguments) -> None:
        self._addresses = np.zeros((num_slots, bottleneck_kernels.NUM_ADDRESSES), dtype=np.int64)
        self._integers = np.zeros((num_slots, bottleneck_kernels.NUM_INTEGERS), dtype=np.int32)
        self._numbers = np.zeros((num_slots, bottleneck_kernels.NUM_NUMBERS), dtype=np.float32)
        self._hidden_size = hidden_size
        self._arguments = arguments
        self._scratch = self._new_scratch(64)
        self._used: set[int] = set()  # a set for the same reason as in ``LinearTable``

    def _new_scratch(self, size: int) -> Array:
        width = 2 * self._hidden_size + -(-size // LANES) * LANES
        return np.empty((self._arguments.num_threads, width), dtype=np.float32)

    def add(self, slot: int, delta: Bottleneck, memory: AdapterMemory) -> None:
        """Enters a bottleneck.

        Raises:
            ModelError: the slot has one already, or the kernel does not know its activation.
        """
        kernels = bottleneck_kernels
        if self._integers[slot, kernels.SIZE]:
            raise ModelError(f"{delta.site}: one bottleneck a site, not two")
        if delta.activation not in kernels.ACTIVATIONS:
            raise ModelError(f"{delta.site}: the CPU kernels do not know the activation {delta.activation!r}")
        size = int(delta.down.shape[0])
        addresses = self._addresses[slot]
        down, up = pack_low_rank(delta.down, delta.up)
        addresses[kernels.DOWN] = memory.add_matrix(down)
        addresses[kernels.UP] = memory.add_matrix(up)
        addresses[kernels.DOWN_BIAS] = memory.add_vector(delta.down_bias)
        addresses[kernels.UP_BIAS] = memory.add_vector(delta.up_bias)
        addresses[kernels.SCALE] = memory.add_vector(delta.scale.expand(self._hidden_size))
        self._add_norm(slot, delta.norm_before, kernels.BEFORE_WEIGHT, kernels.BEFORE_EPS, memory)
        self._add_norm(slot, delta.norm_after, kernels.AFTER_WEIGHT, kernels.AFTER_EPS, memory)
        self._numbers[slot, kernels.KEEP] = delta.keep
        self._numbers[slot, kernels.CARRY] = delta.carry
        integers = self._integers[slot]
        integers[kernels.ACTIVATION] = kernels.ACTIVATIONS.index(delta.activation)
        integers[kernels.INPUT] = _INPUTS[delta.input]
        integers[kernels.NORM_RESIDUAL] = _INPUTS[delta.norm_residual]
        if 2 * self._hidden_size + size > self._scratch.shape[1]:
            self._scratch = self._new_scratch(size)
        integers[kernels.SIZE] = size
        self._used.add(slot)

    def _add_norm(
        self, slot: int, norm: LayerNorm | None, weight: int, eps: int, memory: AdapterMemory
    ) -> None:
        self._addresses[slot, weight : weight + 2] = 0
        if norm is not None:
            self._addresses[slot, weight] = memory.add_vector(norm.weight)
            self._addresses[slot, weight + 1] = memory.add_vector(norm.bias)
            self._numbers[slot, eps] = norm.eps

    def clear(self, slot: int) -> None:
        """Takes a slot's bottleneck out."""
        self._used.discard(slot)
        self._integers[slot, bottleneck_kernels.SIZE] = 0

    def run(self, residual: Tensor, output: Tensor, rows: AdapterRows) -> None:
        """Gives each row its own bottleneck; see ``AdapterSlots.add_bottlenecks``."""
        if self._used:
            bottleneck_kernels.bottleneck(
                residual.numpy(),
                output.numpy(),
                rows.rows.numpy(),
                rows.slots.numpy(),
                self._addresses,
                self._integers,
                self._numbers,
                self._arguments.like,
                self._arguments.f32,
                self._scratch,
            )


def new_arguments(dtype: torch.dtype, num_threads: int) -> KernelArguments:
    """Arguments for matrices kept in ``dtype``."""
    return KernelArguments(
        like=as_array(torch.empty(1, dtype=dtype)), f32=np.empty(1, dtype=np.float32), num_threads=num_threads
    )
