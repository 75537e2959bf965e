"""Weights, caches and adapters in the layouts that the CPU kernels read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
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
"""Rows of weights that are the lanes of a vector, where the outputs are the lanes."""
GROUPS = 3
"""Of a panel of them."""
_BY_INT16 = (col.NF4_BY_INT16, col.INT8)
_IN_GROUPS = (*_BY_INT16, col.FLOAT32_GROUPS, col.BFLOAT16_GROUPS, col.BFLOAT16_PAIRS)
CODE_STEPS = 4075
"""NF4's values are whole numbers of these: of all that leave room for a block's sum, those with the least error."""


@dataclass(frozen=True, slots=True, eq=False)
class CpuLinear:
    """One or more linears over the same input, as the ``linear`` kernel takes them.

    ``absmax`` and what follows are empty unless the weights are NF4, and what follows ``row_block`` too where
    ``absmax`` is float32 rather than uint8. Where the weights are for inputs in 16-bit integers, NF4 in 32-bit words or
    int8, ``absmax`` is int16, in units of the rows' ``row_offset``, and the other three are empty.

    Attributes:
        kind: of the weights; see ``columns``.
    """

    kind: int
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
        return self.kind in _BY_INT16

    @property
    def converted_size(self) -> int:
        """32-bit words of a row of inputs that are not float32: pairs, of integers also a step a block; else 0."""
        if self.takes_int16:
            return self.in_features // 2 + self.in_features // BLOCK_SIZE
        return self.in_features // 2 if self.kind == col.BFLOAT16_PAIRS else 0

    @property
    def panel_rows(self) -> int:
        """Weight rows that are one unit of work."""
        if self.kind in _IN_GROUPS:
            return GROUPS * GROUP_ROWS
        return max(3, PANEL_BYTES // (4 * self.in_features) // 3 * 3)

    @property
    def num_scratch_values(self) -> int:
        """float32 values of scratch for decoded weights."""
        if self.takes_int16:
            return GROUP_ROWS // 2 * self.in_features
        if self.kind in _IN_GROUPS:
            return 0
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


def pack_rows(a: Array, to: Array) -> None:
    """Write a low-rank delta's A, [R, d_in], as the ``low_rank`` kernel reads it.

    Rows come in fours, eight values of each row in turn, then the remaining rows one by one.

    Args:
        a: the matrix, row by row.
        to: [R · d_in], where to, of the same type.
    """
    rank, d_in = a.shape
    fours = rank - rank % 4
    lanes = np.dtype((np.void, LANES * a.itemsize))  # copied as one value: several times as fast
    rows = a[:fours].view(lanes).reshape(-1, 4, d_in // LANES)
    to[: fours * d_in].view(lanes).reshape(-1, d_in // LANES, 4)[...] = rows.transpose(0, 2, 1)
    to[fours * d_in :] = a[fours:].reshape(-1)


def pack_columns(b: Array, to: Array) -> None:
    """Write a low-rank delta's B, [d_out, R], as the ``low_rank`` kernel reads it.

    It is transposed, in blocks of 32 columns, then of eight.

    Args:
        b: the matrix, row by row.
        to: [d_out · R], where to, of the same type.
    """
    d_out, rank = b.shape
    wide = d_out - d_out % 32
    for begin, end, width in ((0, wide, 32), (wide, d_out, LANES)):
        if begin < end:
            blocks = b[begin:end].reshape(-1, width, rank).transpose(0, 2, 1)
            to[begin * rank : end * rank].reshape(-1, rank, width)[...] = blocks


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
    bias = joined_bias(parts)
    quantized = [weight for weight in weights if isinstance(weight, Nf4Weight)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if quantized:
        return _pack_nf4(quantized, in_features, out_features, bias)
    # A single matrix is read in place: a tied output head shares the embedding's memory.
    joined = as_array((dense[0] if len(dense) == 1 else torch.cat(dense)).reshape(-1))
    kind = col.BFLOAT16 if joined.dtype == np.uint16 else col.FLOAT32
    return dense_linear(kind, (in_features, out_features), joined, bias)


def dense_linear(kind: int, sizes: tuple[int, int], weights: Array, bias: Array) -> CpuLinear:
    """A linear of that many inputs and outputs whose weights have no scales."""
    empty = np.empty(0, dtype=np.float32)
    return CpuLinear(
        kind=kind,
        in_features=sizes[0],
        out_features=sizes[1],
        weights=weights,
        bias=bias,
        absmax=np.empty(0, dtype=np.uint8),
        row_block=np.empty(0, dtype=np.int32),
        row_offset=empty,
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


def joined_bias(parts: Sequence[Linear]) -> Array:
    """The biases of linears, one after another; zeros for what has none."""
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


def _pack_nf4(weights: Sequence[Nf4Weight], in_features: int, out_features: int, bias: Array) -> CpuLinear:
    first_code = weights[0].nested_code
    if not all(weight.is_nested and torch.equal(weight.nested_code, first_code) for weight in weights):
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
        kind=col.NESTED_NF4,
        in_features=in_features,
        out_features=out_features,
        weights=np.concatenate([interleave_nibbles(weight.packed) for weight in weights]),
        bias=bias,
        absmax=np.concatenate(absmax),
        row_block=np.concatenate(row_block).astype(np.int32),
        row_offset=np.concatenate(offsets),
        nested=np.concatenate(nested),
        nested_code=first_code.numpy(),
    )


def _pack_plain(weights: Sequence[Nf4Weight], in_features: int, out_features: int, bias: Array) -> CpuLinear:
    """NF4 whose absmaxes are float32, or quantized by different codes; quantized ones are dequantized: exact."""
    empty = np.empty(0, dtype=np.float32)
    return CpuLinear(
        kind=col.PLAIN_NF4,
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
