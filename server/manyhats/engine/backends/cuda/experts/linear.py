"""Linears of all experts of a layer, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from manyhats.engine.backends.cuda.experts.routing import SortedPairs
from manyhats.engine.backends.cuda.linears.dense import DenseLinear
from manyhats.engine.backends.cuda.linears.linear import CudaLinear
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.backends.cuda.linears.tiles import BLOCK, RowTiles, bucket_of
from manyhats.engine.backends.cuda.triton.expert_linear import dense_experts, nf4_experts
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear

_MOST_ROWS = 128
"""The bucket of tiles for any more pairs: with the next one's there are no registers left for the pairs."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLinears:
    """Linears over the same input, side by side, of each expert; all of one kind and shape.

    Attributes:
        experts: their weights.
        table: [E, 7] int64, the addresses of an expert's tensors.
    """

    experts: tuple[CudaLinear, ...]
    table: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.experts[0].out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self.experts[0].in_features

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.table.nbytes + sum(expert.num_bytes for expert in self.experts)

    def tile(self, num_pairs: int) -> RowTiles:
        """For so many pairs, about as many of each expert; any tile gives the same bits."""
        tiles, bucket = self.experts[0].tiles, bucket_of(-(-num_pairs // len(self.experts)))
        by_rows = tiles.dense if isinstance(self.experts[0], DenseLinear) else tiles.nf4
        return by_rows[min(bucket, _MOST_ROWS)]


def pack_experts(
    name: str, of_experts: Sequence[Sequence[Linear]], sm: int, device: torch.device
) -> ExpertLinears:
    """Linears side by side of each expert, as ``pack_linear`` packs them, all experts alike.

    Args:
        name: of the linears, for errors.
        of_experts: for each expert, linears without biases.
        sm: compute capability of the device, such as 90.
        device: where the weights go.

    Raises:
        ModelError: linears do not go together, or one has a bias.
    """
    every = [linear for linears in of_experts for linear in linears]
    if any(linear.bias is not None for linear in every):
        raise ModelError(f"{name}: the CUDA kernels know no biases of experts")
    quantized = [linear.matrix for linear in every if isinstance(linear.matrix, Nf4Weight)]
    if len(quantized) < len(every):
        of_experts = [[_dense(linear) for linear in linears] for linears in of_experts]
    experts = _packed(name, of_experts, sm, device, flattens=False)
    if len({_is_nested(expert) for expert in experts}) > 1:
        experts = _packed(name, of_experts, sm, device, flattens=True)
    addresses = torch.tensor([_addresses(expert) for expert in experts], dtype=torch.int64)
    return ExpertLinears(experts, addresses.to(device))


def _packed(
    name: str, of_experts: Sequence[Sequence[Linear]], sm: int, device: torch.device, *, flattens: bool
) -> tuple[CudaLinear, ...]:
    return tuple(pack_linear(name, linears, sm, device, flattens=flattens) for linears in of_experts)


def _dense(linear: Linear) -> Linear:
    matrix = linear.matrix
    return Linear(matrix.dequantize()) if isinstance(matrix, Nf4Weight) else linear


def _is_nested(linear: CudaLinear) -> bool:
    return isinstance(linear, Nf4Linear) and linear.nested is not None


def _addresses(linear: CudaLinear) -> tuple[int, ...]:
    """Of the tensors in the order of the kernels' table, 0 for none."""
    if isinstance(linear, DenseLinear):
        return (linear.weight.data_ptr(), *(0,) * 6)
    tensors = (
        linear.packed,
        linear.absmax,
        linear.nested,
        linear.nested_code,
        linear.code,
        linear.first_block,
        linear.row_offset,
    )
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def expert_linear(x: Tensor, linears: ExpertLinears, pairs: SortedPairs, y: Tensor, tile: RowTiles) -> None:
    """``y[pair] = x W̃ᵀ``, W̃ of the pair's expert and x of its row, or of itself.

    Args:
        x: [N, K] or [N · k, K] bfloat16, its rows dense.
        linears: of K inputs and M outputs.
        pairs: in tiles of as many as ``tile`` has rows.
        y: [N · k, M] float32 or bfloat16, its rows dense; written whole.
        tile: how pairs and weights are cut.
    """
    (num_rows, in_features), (num_pairs, out_features) = x.shape, y.shape
    if num_pairs == 0:
        return
    assert x.dtype == torch.bfloat16
    assert x.stride(1) == y.stride(1) == 1
    sizes = out_features, triton.cdiv(in_features, BLOCK), x.stride(0), y.stride(0)
    cut = {"TOP": num_pairs // num_rows, "K": in_features, "BK": BLOCK, "RB": tile.rows, "BN": tile.weights}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    grid = pairs.max_tiles, triton.cdiv(out_features, tile.weights)
    work = x, linears.table, pairs.pairs, pairs.tiles, pairs.num_tiles, y
    first = linears.experts[0]
    if isinstance(first, DenseLinear):
        dense_experts[grid](*work, *sizes, **cut, **options)
    else:
        own = {"IS_NESTED": _is_nested(first), "GATHERS": tile.gathers}
        nf4_experts[grid](*work, *sizes, **cut, **own, **options)
