"""Random linears for tests of CUDA's kernels, and what their products are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.linears.tiles import ROW_BUCKETS, LinearTiles, RowTiles
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear
from support.gpu.interpreter import DEVICE


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_nf4(rows: int, columns: int, *, seed: int, is_nested: bool = True, tables: int = 0) -> Nf4Weight:
    """An NF4 matrix of random codes; its tables of codes, whose values need all of float32's bits, have a seed."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = rows * columns // 64
    num_groups = -(-num_blocks // 256)

    def some_bytes(size: int) -> Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)

    return Nf4Weight(
        packed=some_bytes(rows * columns // 2),
        absmax=some_bytes(num_blocks) if is_nested else torch.rand(num_blocks, generator=generator),
        nested_absmax=torch.rand(num_groups if is_nested else 0, generator=generator),
        offset=float(torch.rand(1, generator=generator)) if is_nested else 0.0,
        code=random(16, seed=1000),
        nested_code=random(256 if is_nested else 0, seed=2000 + tables),
        shape=(rows, columns),
    )


def nf4_linears(
    sizes: Sequence[int], columns: int, *, seed: int = 0, biased: int = 0, is_nested: bool = True
) -> list[Linear]:
    """Linears side by side; bit i of ``biased`` gives the i-th one a bias."""
    return [
        Linear(
            random_nf4(size, columns, seed=seed + index, is_nested=is_nested),
            random(size, seed=seed + 50 + index) if biased >> index & 1 else None,
        )
        for index, size in enumerate(sizes)
    ]


def rounded(linear: Linear) -> Tensor:
    """The weights that are multiplied, in bfloat16."""
    matrix = linear.matrix
    return (matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix).bfloat16()


def definition(x: Tensor, linears: Sequence[Linear]) -> Tensor:
    """``x W̃ᵀ + bias`` in float64, on the host."""
    found = [
        x.cpu().double() @ rounded(linear).double().T + (0.0 if linear.bias is None else linear.bias.double())
        for linear in linears
    ]
    return torch.cat(found, dim=1)


def all_alike(tile: RowTiles, *, splits: int, block_k: int = 64) -> LinearTiles:
    """The same tiles for any number of rows; those of the last bucket, which may not be split, are walked."""
    last = RowTiles(tile.rows, tile.weights, tile.num_warps, tile.num_stages, gathers=tile.gathers)
    by_rows: Mapping[int, RowTiles] = dict.fromkeys(ROW_BUCKETS[:-1], tile) | {ROW_BUCKETS[-1]: last}
    return LinearTiles(block_k, splits, by_rows, by_rows)


def inputs(rows: int, columns: int, *, seed: int) -> Tensor:
    """[rows, columns] bfloat16 on the device, as part of wider rows."""
    return random(rows, columns + 8, seed=seed).bfloat16().to(DEVICE)[:, :columns]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of the device; what is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
