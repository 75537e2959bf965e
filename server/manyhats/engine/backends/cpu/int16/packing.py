"""Linears with weights in codes in the layout that ``int16.tile`` reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.packing import (
    CODE_STEPS,
    GROUP_ROWS,
    Array,
    CpuLinear,
    Floats,
    joined_bias,
)
from manyhats.engine.model.nf4 import BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Linear

_SCALE_STEPS = 2**15 - 1
_INT8_STEPS = 2**7 - 1
_LARGEST_FOR_INT8 = 1e15
_ROWS_AT_ONCE = 2**12
"""Of a dense matrix that is quantized, so that little of it is float32 at a time; a multiple of groups."""


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
    return _of_integers((size, out), words, joined_bias(parts), steps, units / np.float32(CODE_STEPS))


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
    return _of_integers((size, out), words.view(-1).numpy(), joined_bias([part]), steps, units)


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
        kind=col.INT8 if weights.dtype == np.int8 else col.NF4_BY_INT16,
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
