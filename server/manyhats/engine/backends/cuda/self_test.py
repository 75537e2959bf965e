"""Before the first request: that a GPU's linears are right, and that a row's bits do not depend on its company.

What the kernels promise follows from their order of sums; that a GPU's instructions keep it, whatever their shape, is
seen here on the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.dense_linear import DenseLinear
from manyhats.engine.backends.cuda.linear import CudaLinear, LinearWorkspace, linear
from manyhats.engine.backends.cuda.linear_tiles import ROW_BUCKETS
from manyhats.engine.backends.cuda.nf4_linear import nf4_dequantize
from manyhats.engine.errors import ModelError

_NUM_ROWS = 20
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


def _check(weights: CudaLinear, workspace: LinearWorkspace, max_rows: int) -> None:
    name = f"{weights.in_features} inputs and {weights.out_features} outputs"
    count = min(_NUM_ROWS, max_rows)
    x = _rows(count, weights)
    alone = torch.cat([_product(x[row : row + 1], weights, workspace) for row in range(count)])
    right = x.float() @ _dense(weights).float().T
    if weights.bias is not None:
        right += weights.bias
    if not bool(((alone - right).abs().max() <= _MAX_ERROR * right.abs().max()).item()):
        raise ModelError(
            f"this GPU multiplies wrongly by a linear of {name}; give --invariance fast, and report it"
        )
    for size in _sizes(count, max_rows):
        among = torch.cat((_rows(size - count, weights), x))
        if not torch.equal(_product(among, weights, workspace)[size - count :], alone):
            raise ModelError(
                f"a row's bits depend on the others of its step on this GPU, in a linear of {name} with {size} rows; "
                "give --invariance fast, and report it"
            )


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


def _product(x: Tensor, weights: CudaLinear, workspace: LinearWorkspace) -> Tensor:
    y = torch.empty(x.shape[0], weights.out_features, device=x.device)
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
