"""Weights, caches and adapters in the layouts that the CPU kernels read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Linear, Matrix

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
LANES = 8
DEPTH = 16
"""A linear's inputs are a multiple of it: the most lanes that the ``linear`` kernel works with."""
PANEL_BYTES = 64 * 1024
"""Of decoded float32 weights; stays in the second-level cache beside four rows of input."""
RESCALED_ROWS = 4
"""Rows whose input an adapter rescales that are multiplied at a time."""
GROUP_ROWS = 16
"""Rows of NF4 weights for inputs in 16-bit integers that are the lanes of a vector."""
GROUPS = 3
"""Of a panel of them."""
CODE_STEPS = 4075
"""NF4's values are whole numbers of these: of all that leave room for a block's sum, those with the least error."""
_SCALE_STEPS = 2**15 - 1
_INT8_STEPS = 2**7 - 1
_LARGEST_FOR_INT8 = 1e15
_ROWS_AT_ONCE = 2**12
"""Of a dense matrix that is quantized, so that little of it is float32 at a time; a multiple of groups."""


@dataclass(frozen=True, slots=True, eq=False)
class CpuLinear:
    """One or more linears over the same input, as the ``linear`` kernel takes them.

    ``absmax`` and what follows are empty unless the weights are NF4, and what follows ``row_block`` too where
    ``absmax`` is float32 rather than uint8. Where the weights are for inputs in 16-bit integers, NF4 in 32-bit words or
    int8, ``absmax`` is int16, in units of the rows' ``row_offset``, and the other three are empty.
    """

    in_features: int
    out_features: int
    weights: Array
    bias: Array
    absmax: Array
    row_block: Array
    row_offset: Array
    nested: Array
    nested_code: Array

    @property
    def num_bytes(self) -> int:
        """Resident bytes of weights, statistics and bias."""
        arrays = (self.weights, self.absmax, self.row_block, self.row_offset, self.nested)
        bias = self.bias.nbytes if self.bias.any() else 0  # linears without one share its zeros
        return sum(array.nbytes for array in arrays) + bias

    @property
    def takes_int16(self) -> bool:
        """Whether its inputs are 16-bit integers."""
        return self.weights.dtype in (np.uint32, np.int8)

    @property
    def quantized_size(self) -> int:
        """32-bit words of a row of inputs as integers: pairs, then a step for each block."""
        return self.in_features // 2 + self.in_features // BLOCK_SIZE if self.takes_int16 else 0

    @property
    def panel_rows(self) -> int:
        """Weight rows that are one unit of work."""
        if self.takes_int16:
            return GROUPS * GROUP_ROWS
        return max(3, PANEL_BYTES // (4 * self.in_features) // 3 * 3)

    @property
    def num_scratch_values(self) -> int:
        """float32 values of scratch for decoded weights."""
        if self.takes_int16:
            return GROUP_ROWS // 2 * self.in_features
        return self.panel_rows * self.in_features


def as_array(tensor: Tensor) -> Array:
    """A CPU tensor's memory as NumPy; bfloat16 as uint16, which NumPy has."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def interleave_nibbles(packed: Tensor) -> Array:
    """Reorders NF4 codes for ``decode_nf4``: 16 bytes hold 32 codes, in four groups of eight.

    Byte 4·g + i of a group of 16 gets element 8·g + i in its low nibble and element 8·g + 4 + i in its high one;
    bitsandbytes keeps elements 2·j and 2·j + 1 in byte j, the first in the high nibble.
    """
    pairs = packed.view(-1, 1)
    codes = torch.cat((pairs >> 4, pairs & 15), dim=1).view(-1, 2, 4)  # [groups of eight, half, i]
    return (codes[:, 0] | (codes[:, 1] << 4)).reshape(-1).numpy()


def pack_low_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A low-rank delta's matrices in the order in which the ``low_rank`` kernel reads them, each as one vector.

    Args:
        a: [R, d_in]; rows come in fours, eight values of each row in turn, then the remaining rows one by one.
        b: [d_out, R]; transposed, in blocks of 32 columns, then of eight.
    """
    rank, d_in = a.shape
    fours = rank - rank % 4
    rows = a[:fours].view(-1, 4, d_in // LANES, LANES).transpose(1, 2)
    wide = b.shape[0] - b.shape[0] % 32
    columns = [b[:wide].view(-1, 32, rank), b[wide:].view(-1, LANES, rank)]
    return (
        torch.cat((rows.reshape(-1), a[fours:].reshape(-1))),
        torch.cat([block.transpose(1, 2).reshape(-1) for block in columns]),
    )


def pack_linear(parts: Sequence[Linear]) -> CpuLinear:
    """Lays out linears over the same input as one.

    Raises:
        ModelError: the inputs are no multiple of sixteen.
    """
    in_features = parts[0].in_features
    if in_features % DEPTH:
        raise ModelError(f"a linear with {in_features} inputs: the CPU kernels need a multiple of {DEPTH}")
    weights = _alike([part.matrix for part in parts])
    out_features = sum(part.out_features for part in parts)
    bias = _bias(parts)
    quantized = [weight for weight in weights if isinstance(weight, Nf4Weight)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if quantized:
        return _pack_nf4(quantized, in_features, out_features, bias)
    empty = np.empty(0, dtype=np.float32)
    # A single matrix is read in place: a tied output head shares the embedding's memory.
    joined = dense[0] if len(dense) == 1 else torch.cat([weight.reshape(-1) for weight in dense])
    return CpuLinear(
        in_features=in_features,
        out_features=out_features,
        weights=as_array(joined.reshape(-1)),
        bias=bias,
        absmax=np.empty(0, dtype=np.uint8),
        row_block=np.empty(0, dtype=np.int32),
        row_offset=empty,
        nested=empty,
        nested_code=empty,
    )


def takes_int16(parts: Sequence[Linear]) -> bool:
    """Whether ``pack_for_int16`` can lay these linears out."""
    return all(isinstance(part.matrix, Nf4Weight) and part.out_features % GROUP_ROWS == 0 for part in parts)


def pack_for_int16(parts: Sequence[Linear]) -> CpuLinear:
    """Lays out NF4 linears over the same input, of a multiple of sixteen outputs each, as ``int16.tile`` reads them."""
    weights = [part.matrix for part in parts if isinstance(part.matrix, Nf4Weight)]
    size, out = parts[0].in_features, sum(part.out_features for part in parts)
    scales = torch.cat([weight.block_scales() for weight in weights]).view(out, -1)
    steps, units = _fixed_point(scales.numpy())
    words = _words_of_groups(torch.cat([weight.packed for weight in weights]), size)
    return _of_integers((size, out), words, _bias(parts), steps, units / np.float32(CODE_STEPS))


def takes_int8(part: Linear) -> bool:
    """Whether ``pack_int8`` can lay a linear out: it is dense, of fitting sizes, and of moderate weights."""
    matrix = part.matrix
    fits = part.in_features % BLOCK_SIZE == 0 and part.out_features % GROUP_ROWS == 0
    return fits and isinstance(matrix, Tensor) and float(matrix.abs().max()) < _LARGEST_FOR_INT8


def pack_int8(part: Linear) -> CpuLinear:
    """Lays out a dense linear in int8 with a scale for each 64 inputs, as ``int16.tile`` reads it."""
    assert isinstance(part.matrix, Tensor)
    size, out = part.in_features, part.out_features
    # In torch's memory, which begins with a cache line: a vector then never lies in two of them.
    words = torch.empty((out // GROUP_ROWS, size // 4, GROUP_ROWS, 4), dtype=torch.int8)
    steps = np.empty((out, size // BLOCK_SIZE), dtype=np.int16)
    units = np.empty(out, dtype=np.float32)
    for first in range(0, out, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, out)
        blocks = part.matrix[first:last].float().view(last - first, -1, BLOCK_SIZE)
        largest = blocks.abs().amax(2)
        steps[first:last], units[first:last] = _fixed_point((largest / _INT8_STEPS).numpy())
        scales = torch.from_numpy(steps[first:last].astype(np.float32) * units[first:last, None])
        inverse = torch.where(scales > 0, 1 / scales, 0)[:, :, None]
        codes = (blocks * inverse).round_().clamp_(-_INT8_STEPS, _INT8_STEPS).to(torch.int8)
        # The bytes of a word are inputs 0, 2, 1 and 3 of four: the low bytes of its two halves are a pair.
        codes = codes.view(-1, GROUP_ROWS, size // 4, 2, 2).permute(0, 2, 1, 4, 3)
        words[first // GROUP_ROWS : last // GROUP_ROWS] = codes.reshape(-1, size // 4, GROUP_ROWS, 4)
    return _of_integers((size, out), words.view(-1).numpy(), _bias([part]), steps, units)


def _fixed_point(scales: Floats) -> tuple[Array, Floats]:
    """Scales [rows, blocks] as int16 steps of a unit [rows] float32, that of the row's largest."""
    units = np.abs(scales).max(axis=1) / np.float32(_SCALE_STEPS)
    return np.rint(scales / np.where(units > 0, units, np.float32(1))[:, None]).astype(np.int16), units


def _of_integers(
    sizes: tuple[int, int], weights: Array, bias: Array, steps: Array, units: Array
) -> CpuLinear:
    """A linear for inputs in 16-bit integers, with its scales [rows, blocks] laid out as tiles read them."""
    empty = np.empty(0, dtype=np.float32)
    return CpuLinear(
        in_features=sizes[0],
        out_features=sizes[1],
        weights=weights,
        bias=bias,
        absmax=steps.reshape(-1, GROUP_ROWS, steps.shape[1]).transpose(0, 2, 1).reshape(-1),
        row_block=np.empty(0, dtype=np.int32),
        row_offset=units,
        nested=empty,
        nested_code=empty,
    )


def _alike(weights: Sequence[Matrix]) -> Sequence[Matrix]:
    """The weights all NF4, or all dense and of one dtype, which holds each value exactly."""
    if all(isinstance(weight, Nf4Weight) for weight in weights):
        return weights
    dense = [weight.dequantize() if isinstance(weight, Nf4Weight) else weight for weight in weights]
    if len({weight.dtype for weight in dense}) > 1:
        return [weight.float() for weight in dense]
    return dense


def _bias(parts: Sequence[Linear]) -> Array:
    if all(part.bias is None for part in parts):
        return _zeros(sum(part.out_features for part in parts))
    return np.concatenate(
        [
            _zeros(part.out_features) if part.bias is None else part.bias.to(torch.float32).numpy()
            for part in parts
        ]
    )


@functools.cache
def _zeros(size: int) -> Array:
    return np.zeros(size, dtype=np.float32)


def _words_of_groups(packed: Tensor, size: int) -> Array:
    """Codes as [groups, size / 8, 16] uint32; see ``int16.tile``."""
    # bitsandbytes keeps the even one of two inputs in the high nibble; here byte j of a pair of inputs j and 4 + j.
    pairs = packed.numpy().reshape(-1, 4, GROUP_ROWS // 4, size // 8, 4)
    inputs = np.stack((pairs >> 4, pairs & 15), axis=-1)  # [groups, quarters, rows, words, pairs, 2]
    low, high = inputs[..., :2, :], inputs[..., 2:, :]
    words = (low | high << 4).transpose(0, 3, 1, 4, 2, 5)  # [groups, words, quarters, pairs, rows, 2]
    # In torch's memory, which begins with a cache line: a vector then never lies in two of them.
    aligned = torch.empty(words.shape, dtype=torch.uint8).numpy()
    aligned[...] = words
    return aligned.reshape(-1).view(np.uint32)


def _pack_nf4(weights: Sequence[Nf4Weight], in_features: int, out_features: int, bias: Array) -> CpuLinear:
    if not all(weight.is_nested for weight in weights):
        return _pack_plain(weights, in_features, out_features, bias)
    per_row = in_features // BLOCK_SIZE
    absmax: list[Array] = []
    row_block: list[Array] = []
    nested: list[Array] = []
    first = 0
    for weight in weights:
        num_blocks = weight.absmax.numel()
        num_groups = weight.nested_absmax.numel()
        # Each part starts a new group of 256 blocks, so that the second-level scale stays block // 256.
        padded = np.zeros(num_groups * NESTED_BLOCK_SIZE, dtype=np.uint8)
        padded[:num_blocks] = weight.absmax.numpy()
        absmax.append(padded)
        row_block.append(first + np.arange(weight.shape[0]) * per_row)
        nested.append(weight.nested_absmax.numpy())
        first += padded.size
    offsets = [np.full(weight.shape[0], weight.offset, dtype=np.float32) for weight in weights]
    return CpuLinear(
        in_features=in_features,
        out_features=out_features,
        weights=np.concatenate([interleave_nibbles(weight.packed) for weight in weights]),
        bias=bias,
        absmax=np.concatenate(absmax),
        row_block=np.concatenate(row_block).astype(np.int32),
        row_offset=np.concatenate(offsets),
        nested=np.concatenate(nested),
        nested_code=weights[0].nested_code.numpy(),
    )


def _pack_plain(weights: Sequence[Nf4Weight], in_features: int, out_features: int, bias: Array) -> CpuLinear:
    """NF4 whose absmaxes are float32; those of parts that quantize theirs are dequantized, which is exact."""
    empty = np.empty(0, dtype=np.float32)
    return CpuLinear(
        in_features=in_features,
        out_features=out_features,
        weights=np.concatenate([interleave_nibbles(weight.packed) for weight in weights]),
        bias=bias,
        absmax=np.concatenate([weight.block_scales().numpy() for weight in weights]),
        row_block=(np.arange(out_features) * (in_features // BLOCK_SIZE)).astype(np.int32),
        row_offset=empty,
        nested=empty,
        nested_code=empty,
    )
