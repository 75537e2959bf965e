"""Linears in the layouts that kernels read, made as a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.linears.dense import DenseLinear
from manyhats.engine.backends.cuda.linears.linear import CudaLinear
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear
from manyhats.engine.backends.cuda.linears.tiles import LinearTiles, tiles_for
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Linear, Matrix


def pack_linear(
    name: str, linears: Sequence[Linear], sm: int, device: torch.device, *, flattens: bool = False
) -> CudaLinear:
    """Linears over the same input, side by side as one.

    NF4 stays NF4. Dense weights are rounded to bfloat16; a single matrix that is bfloat16 and on the device already is
    used as it is, as by an output head that shares the embedding's memory. Where some are NF4 and some are dense, all
    become dense: the products are the same, since NF4 weights are rounded to bfloat16 before they are multiplied.

    Args:
        name: of the linears, for errors.
        linears: one or more, with as many inputs each.
        sm: compute capability of the device, such as 90.
        device: where the weights go.
        flattens: keep the absmaxes of NF4 in float32 even if they are quantized: 9 % more memory, fewer steps to
            decode them, the same values.

    Raises:
        ModelError: linears do not go together.
    """
    widths = sorted({linear.in_features for linear in linears})
    if len(widths) != 1:
        raise ModelError(f"{name}: linears side by side have {widths} inputs")
    tiles = tiles_for(sm, sum(linear.out_features for linear in linears), widths[0])
    bias = _joined_bias(linears, device)
    matrices = [linear.matrix for linear in linears]
    quantized = [matrix for matrix in matrices if isinstance(matrix, Nf4Weight)]
    if len(quantized) < len(matrices):
        return DenseLinear(_joined_dense(matrices, device), bias, tiles)
    if any(not torch.equal(matrix.code, quantized[0].code) for matrix in quantized):
        raise ModelError(f"{name}: linears side by side have different tables of NF4 codes")
    if flattens or not _are_nested_alike(quantized):
        return _plain(quantized, bias, tiles, device)
    return _nested(quantized, bias, tiles, device)


def _joined_bias(linears: Sequence[Linear], device: torch.device) -> Tensor | None:
    """[N] float32, 0 for linears without a bias; None if none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    biases = (
        torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float() for linear in linears
    )
    return torch.cat([bias.to(device) for bias in biases])


def _joined_dense(matrices: Sequence[Matrix], device: torch.device) -> Tensor:
    dense = [
        (matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix).to(device, torch.bfloat16)
        for matrix in matrices
    ]
    return dense[0].contiguous() if len(dense) == 1 else torch.cat(dense)


def _are_nested_alike(matrices: Sequence[Nf4Weight]) -> bool:
    """Whether all absmaxes are quantized, by the same table of codes."""
    first = matrices[0]
    return first.is_nested and all(
        matrix.is_nested and torch.equal(matrix.nested_code, first.nested_code) for matrix in matrices
    )


def _nested(
    matrices: Sequence[Nf4Weight], bias: Tensor | None, tiles: LinearTiles, device: torch.device
) -> Nf4Linear:
    """Absmaxes stay quantized. A matrix's first block begins a group of 256."""
    per_row = matrices[0].shape[1] // BLOCK_SIZE
    first_blocks, num_groups = [], 0
    for matrix in matrices:
        first_blocks.append(num_groups * NESTED_BLOCK_SIZE + torch.arange(matrix.shape[0]) * per_row)
        num_groups += matrix.nested_absmax.numel()
    offsets = [torch.full((matrix.shape[0],), matrix.offset) for matrix in matrices]
    return Nf4Linear(
        packed=_packed(matrices, device),
        absmax=_by_block([matrix.absmax for matrix in matrices], per_row, device),
        code=matrices[0].code.to(device),
        bias=bias,
        tiles=tiles,
        nested=torch.cat([matrix.nested_absmax for matrix in matrices]).to(device),
        nested_code=matrices[0].nested_code.to(device),
        first_block=torch.cat(first_blocks).int().to(device),
        row_offset=torch.cat(offsets).to(device),
    )


def _plain(
    matrices: Sequence[Nf4Weight], bias: Tensor | None, tiles: LinearTiles, device: torch.device
) -> Nf4Linear:
    """Absmaxes in float32; those that are quantized are dequantized, which is exact."""
    per_row = matrices[0].shape[1] // BLOCK_SIZE
    return Nf4Linear(
        packed=_packed(matrices, device),
        absmax=_by_block([matrix.block_scales() for matrix in matrices], per_row, device),
        code=matrices[0].code.to(device),
        bias=bias,
        tiles=tiles,
    )


def _packed(matrices: Sequence[Nf4Weight], device: torch.device) -> Tensor:
    return torch.cat([repacked(matrix.packed.to(device), matrix.shape[1]) for matrix in matrices])


def _by_block(absmaxes: Sequence[Tensor], per_row: int, device: torch.device) -> Tensor:
    """Absmaxes row by row as [blocks of a row, rows]: a program reads those of its rows in one piece."""
    rows = [absmax.to(device).view(-1, per_row).t() for absmax in absmaxes]
    return torch.cat(rows, dim=1).contiguous()


def repacked(packed: Tensor, in_features: int) -> Tensor:
    """NF4's bytes as [rows, K / 2], each block of 64 as the kernels read it.

    Byte j has elements 2 · j and 2 · j + 1 of a block, and then elements j and j + 32, the first in the high nibble.
    """
    halves = packed.view(-1, in_features // BLOCK_SIZE, 2, BLOCK_SIZE // 4)
    first, second = halves[:, :, 0], halves[:, :, 1]
    even, odd = (first & 0xF0) | (second >> 4), (first << 4) | (second & 0x0F)
    return torch.stack((even, odd), dim=-1).view(-1, in_features // 2)
