"""Before the first request: that a GPU's linears are right, and that a row's bits do not depend on its company.

What the kernels promise follows from their order of sums; that a GPU's instructions keep it, whatever their shape, is
seen here on the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.experts.linear import ExpertLinears, expert_linear
from manyhats.engine.backends.cuda.experts.routing import SortedPairs, sort_pairs
from manyhats.engine.backends.cuda.linears.dense import DenseLinear
from manyhats.engine.backends.cuda.linears.linear import CudaLinear, LinearWorkspace, linear
from manyhats.engine.backends.cuda.linears.nf4 import nf4_dequantize
from manyhats.engine.backends.cuda.linears.tiles import ROW_BUCKETS
from manyhats.engine.errors import ModelError

_NUM_ROWS = 20
_OUTPUTS = 4096
_MAX_ERROR = 0.01
"""Of results rounded to bfloat16, relative to the largest."""


def check_linears(linears: Iterable[CudaLinear], workspace: LinearWorkspace, max_rows: int) -> None:
    """Multiply some rows by a linear of each shape: one by one, together, and among as many as there may be.

    It waits for the device.

    Raises:
        ModelError: a product is wrong, or a row's bits depend on the others.
    """
    shapes = {(type(each), each.out_features, each.in_features): each for each in linears}
    for each in shapes.values():
        _check(each, workspace, max_rows)


def check_experts(linears: Iterable[ExpertLinears], max_rows: int) -> None:
    """The same of experts' linears: some rows sent to one expert, one by one, and together in tiles of each size.

    Raises:
        ModelError: as ``check_linears``.
    """
    shapes = {(type(each.experts[0]), each.out_features, each.in_features): each for each in linears}
    for each in shapes.values():
        _check_experts(each, max_rows)


def _check(weights: CudaLinear, workspace: LinearWorkspace, max_rows: int) -> None:
    count = min(_NUM_ROWS, max_rows)
    x = _rows(count, weights)
    alone = torch.cat([_product(x[row : row + 1], weights, workspace) for row in range(count)])
    _check_values(weights, x, alone)
    for size in _sizes(count, max_rows):
        among = torch.cat((_rows(size - count, weights), x))
        _check_bits(weights, _product(among, weights, workspace)[size - count :], alone, size)
        rounded = _product(among, weights, workspace, torch.bfloat16)[size - count :]
        _check_bits(weights, rounded, alone.bfloat16(), size)


def _check_experts(experts: ExpertLinears, max_rows: int) -> None:
    first, count = experts.experts[0], min(_NUM_ROWS, max_rows)
    x = _rows(count, first)
    alone = torch.cat([_of_expert(x[row : row + 1], experts, ROW_BUCKETS[0]) for row in range(count)])
    _check_values(first, x, alone)
    for bucket in ROW_BUCKETS:
        _check_bits(first, _of_expert(x, experts, bucket), alone, bucket)


def _check_values(weights: CudaLinear, x: Tensor, found: Tensor) -> None:
    """A part of the outputs at a time: a head in float32 would take gigabytes that the KV cache has by now."""
    dense, bias = _dense(weights), weights.bias
    for first in range(0, weights.out_features, _OUTPUTS):
        part = slice(first, first + _OUTPUTS)
        right = x.float() @ dense[part].float().T
        if bias is not None:
            right += bias[part]
        off = (found[:, part] - right).abs().max()
        if not bool((off <= _MAX_ERROR * right.abs().max()).item()):
            raise ModelError(
                f"this GPU multiplies wrongly by a linear of {_name_of(weights)}; give --invariance fast, and report it"
            )


def _check_bits(weights: CudaLinear, found: Tensor, alone: Tensor, num_rows: int) -> None:
    if not torch.equal(found, alone):
        raise ModelError(
            f"a row's bits depend on the others of its step on this GPU, in a linear of {_name_of(weights)} with "
            f"{num_rows} rows; give --invariance fast, and report it"
        )


def _name_of(weights: CudaLinear) -> str:
    return f"{weights.in_features} inputs and {weights.out_features} outputs"


def _of_expert(x: Tensor, experts: ExpertLinears, bucket: int) -> Tensor:
    """Rows sent to the first expert, in tiles for as many rows as a bucket has."""
    num_experts, device = len(experts.experts), x.device
    tile = experts.tile(bucket * num_experts)
    room = SortedPairs.room(x.shape[0], num_experts, tile.rows, device)
    chosen = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=device)
    pairs = sort_pairs(chosen, num_experts, tile.rows, room)
    y = torch.empty(x.shape[0], experts.out_features, device=device)
    expert_linear(x, experts, pairs, y, tile)
    return y


def _sizes(least: int, max_rows: int) -> list[int]:
    """Numbers of rows, one for each way in which the work is shared."""
    buckets = [bucket for bucket in ROW_BUCKETS if least <= bucket <= max_rows]
    return [*dict.fromkeys((least, *buckets, max_rows))]


def _rows(count: int, weights: CudaLinear) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, weights.in_features, generator=generator)
    return x.to(_device_of(weights), torch.bfloat16)


def _device_of(weights: CudaLinear) -> torch.device:
    """Where a linear is."""
    return weights.weight.device if isinstance(weights, DenseLinear) else weights.packed.device


def _product(
    x: Tensor, weights: CudaLinear, workspace: LinearWorkspace, dtype: torch.dtype = torch.float32
) -> Tensor:
    y = torch.empty(x.shape[0], weights.out_features, dtype=dtype, device=x.device)
    linear(x, weights, y, workspace)
    return y


def _dense(weights: CudaLinear) -> Tensor:
    if isinstance(weights, DenseLinear):
        return weights.weight
    decoded = torch.empty(
        weights.out_features, weights.in_features, dtype=torch.bfloat16, device=weights.packed.device
    )
    nf4_dequantize(weights, decoded)
    return decoded
