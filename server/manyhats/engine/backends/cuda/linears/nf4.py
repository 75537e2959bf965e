"""Linears whose weights are NF4, on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from manyhats.engine.backends.cuda.linears.launch import launch
from manyhats.engine.backends.cuda.linears.tiles import BLOCK, LinearTiles, bucket_of
from manyhats.engine.backends.cuda.triton.nf4_linear import nf4_dequantize as dequantizing_kernel
from manyhats.engine.backends.cuda.triton.nf4_linear import nf4_linear as kernel

_DEQUANTIZED_ROWS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Linear:
    """One or more linears over the same input, side by side: N rows of K weights in blocks of 64.

    Attributes:
        packed: uint8 [N, K / 2]; byte j of a block has code j (high nibble) and code j + 32.
        absmax: uint8 [K / 64, N], codes into ``nested_code``; or float32, the absmaxes as they are.
        code: float32 [16].
        bias: [N] float32; None for none.
        tiles: of products with it.
        nested: float32, the absmax of each 256 blocks of a linear; None for plain absmaxes, like what follows.
        nested_code: float32 [256].
        first_block: int32 [N], the first block of each row; 256 of them are a value of ``nested``.
        row_offset: float32 [N], the mean of the absmaxes of each row's linear.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    bias: Tensor | None
    tiles: LinearTiles
    nested: Tensor | None = None
    nested_code: Tensor | None = None
    first_block: Tensor | None = None
    row_offset: Tensor | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.packed.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.packed.shape[1]) * 2

    @property
    def num_bytes(self) -> int:
        """Resident bytes, without the shared tables of codes."""
        tensors = (self.packed, self.absmax, self.nested, self.first_block, self.row_offset, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def nf4_linear(x: Tensor, linear: Nf4Linear, y: Tensor, parts: Tensor) -> None:
    """``y = x W̃ᵀ + bias`` with ``W̃ = bf16(code · absmax)``, summed in float32, K ascending.

    Args:
        x: [M, K] bfloat16, its rows dense.
        linear: of K inputs and N outputs.
        y: [M, N] float32 or bfloat16, its rows dense; written whole.
        parts: workspace, float32 [≥ splits · M · N] for as many rows as ``tiles.num_partial_rows``.
    """
    tile = linear.tiles.nf4[bucket_of(x.shape[0])]
    weights = (linear.packed, *_tables(linear))
    launch(kernel, x, weights, linear.bias, y, parts, linear.tiles, tile, GATHERS=tile.gathers)


def nf4_dequantize(linear: Nf4Linear, weight: Tensor) -> None:
    """``weight = bf16(code · absmax)``, bit-equal to ``Nf4Weight.dequantize`` rounded to bfloat16.

    Args:
        linear: of K inputs and N outputs.
        weight: [N, K] bfloat16, contiguous; written whole.
    """
    rows, columns = linear.out_features, linear.in_features
    assert weight.shape == (rows, columns)
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous()
    dequantizing_kernel[(columns // BLOCK, triton.cdiv(rows, _DEQUANTIZED_ROWS))](
        linear.packed,
        *_tables(linear),
        weight,
        rows,
        K=columns,
        BN=_DEQUANTIZED_ROWS,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )


def _tables(linear: Nf4Linear) -> tuple[Tensor | None, ...]:
    return (
        linear.absmax,
        linear.nested,
        linear.nested_code,
        linear.code,
        linear.first_block,
        linear.row_offset,
    )
