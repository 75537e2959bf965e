"""How the kernels of linears are launched, which differ in what they read weights from."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from manyhats.engine.backends.cuda.linears.tiles import LinearTiles, RowTiles
from manyhats.engine.backends.cuda.triton.reduce_splits import reduce_splits

_REDUCED = 512
"""Outputs of one program that adds the sums of ranges."""


def launch(
    kernel: Any,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
    y: Tensor,
    parts: Tensor,
    tiles: LinearTiles,
    tile: RowTiles,
    **constants: Any,
) -> None:
    """``y = x Wᵀ + bias`` by one kernel or, with few rows and K in ranges, by two.

    Args:
        kernel: takes x, the weights, bias and result, sizes, and how K, rows and weights are cut.
        x: [M, K] bfloat16, its rows dense.
        weights: what the kernel reads them from.
        bias: [N] float32, or None.
        y: [M, N] float32 or bfloat16, its rows dense; written whole.
        parts: workspace, float32; at least splits · M · N if the product is split.
        tiles: how K is cut.
        tile: how rows and weights are.
        constants: the kernel's own.
    """
    (num_rows, in_features), out_features = x.shape, y.shape[1]
    if num_rows == 0:
        return
    assert x.dtype == torch.bfloat16
    assert x.stride(1) == y.stride(1) == 1
    assert y.shape[0] == num_rows
    is_split = tile.is_split and tiles.splits > 1
    assert not is_split or parts.numel() >= tiles.splits * num_rows * out_features
    grid = (
        triton.cdiv(num_rows, tile.rows),
        triton.cdiv(out_features, tile.weights),
        tiles.splits if is_split else 1,
    )
    to, stride = (parts, out_features) if is_split else (y, y.stride(0))
    kernel[grid](
        x,
        *weights,
        None if is_split else bias,
        to,
        num_rows,
        out_features,
        tiles.num_steps(in_features),
        x.stride(0),
        stride,
        K=in_features,
        BK=tiles.block_k,
        SPLITS=tiles.splits,
        IS_SPLIT=is_split,
        RB=tile.rows,
        BN=tile.weights,
        **constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )
    if is_split:
        reduce_splits[(triton.cdiv(out_features, _REDUCED), num_rows)](
            parts,
            bias,
            y,
            num_rows,
            out_features,
            y.stride(0),
            SPLITS=tiles.splits,
            B=_REDUCED,
            num_warps=4,
            enable_fp_fusion=False,
        )
