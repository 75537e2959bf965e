"""Configurations of linears that may be the fastest, and products by each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.model import random_nf4
from manyhats.engine.backends.cuda.linears.dense import DenseLinear, dense_linear
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear, nf4_dequantize, nf4_linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.backends.cuda.linears.tiles import (
    MAX_SPLITS,
    ROW_BUCKETS,
    LinearTiles,
    RowTiles,
    bucket_of,
    default_splits,
    tiles_for,
)
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear

Shape = tuple[int, int]
"""Output and input features."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to multiply weights of one shape, with the numbers of rows of one bucket.

    Attributes:
        shape: of the weights.
        block_k, splits: which decide a row's bits.
        bucket: of ``ROW_BUCKETS``.
        tile: which does not.
        is_dense: of bfloat16 rather than NF4.
    """

    shape: Shape
    block_k: int
    splits: int
    bucket: int
    tile: RowTiles
    is_dense: bool = False

    @property
    def key(self) -> list[object]:
        """What JSON has of it."""
        tile = self.tile
        return [
            *self.shape, self.block_k, self.splits, self.bucket, self.is_dense,
            tile.rows, tile.weights, tile.num_warps, tile.num_stages, tile.is_split, tile.gathers,
        ]  # fmt: skip

    @classmethod
    def of(cls, key: Sequence[int]) -> Candidate:
        """From its key."""
        n, k, block_k, splits, bucket, is_dense, rows, weights, warps, stages, is_split, gathers = key
        tile = RowTiles(rows, weights, warps, stages, is_split=bool(is_split), gathers=bool(gathers))
        return cls((n, k), block_k, splits, bucket, tile, bool(is_dense))

    def serves(self, rows: int) -> bool:
        """Whether it would be taken for so many rows."""
        return bucket_of(rows) == self.bucket


def families(shape: Shape, *, is_tiny: bool) -> list[tuple[int, int]]:
    """Ways to cut K, (block_k, splits), the default first: half, or twice as many ranges, and longer steps."""
    usual = default_splits(*shape)
    found = [(64, usual)]
    if is_tiny:
        return found
    others = [(64, splits) for splits in (usual // 2, 2 * usual) if 1 <= splits <= MAX_SPLITS]
    others.append((128, usual))
    return found + [each for each in others if _tiles(*each).fits(shape[1])]


def nf4_candidates(
    shape: Shape, family: tuple[int, int], sm: int, *, is_tiny: bool = False
) -> Iterator[Candidate]:
    """Those of each bucket: the rule's tiles, and the same with other lookups of codes and stages.

    With the usual way to cut K also those with other warps and sizes.
    """
    usual = tiles_for(sm, *shape).nf4
    has_more = not is_tiny and family == families(shape, is_tiny=True)[0]
    for bucket in ROW_BUCKETS[:2] if is_tiny else ROW_BUCKETS:
        tile = usual[bucket]
        others = [
            replace(tile, num_stages=3, gathers=False),
            replace(tile, num_stages=1, gathers=False),
            *(_larger(tile) if has_more else ()),
        ]
        for each in dict.fromkeys((tile, *others)):
            yield Candidate(shape, *family, bucket, each)


def dense_candidates(shape: Shape, family: tuple[int, int], sm: int) -> Iterator[Candidate]:
    """Those of bfloat16, by the rule; with other ways to cut K only for the many rows that weights are decoded for."""
    usual = tiles_for(sm, *shape).dense
    is_usual = family == families(shape, is_tiny=True)[0]
    for bucket in ROW_BUCKETS if is_usual else ROW_BUCKETS[-2:]:
        tile = usual[bucket]
        if family[1] > 1 and tile.rows > 128:
            tile = replace(tile, rows=128)  # a second sum leaves no registers for the widest instruction
        yield Candidate(shape, *family, bucket, tile, is_dense=True)


def _larger(tile: RowTiles) -> list[RowTiles]:
    """Of few rows, more rows of weights in one program; of many, the other numbers of warps and rows."""
    if tile.rows <= 32:
        return [replace(tile, weights=128, num_stages=3)]
    if tile.rows == 64:
        return [replace(tile, weights=128, num_warps=8)]
    return [replace(tile, num_warps=12 - tile.num_warps), replace(tile, rows=64)]


def _tiles(block_k: int, splits: int, tile: RowTiles | None = None) -> LinearTiles:
    """The same for any number of rows; those of the last bucket may not be split."""
    tile = tile or RowTiles(16, 64, 4, 1)
    last = replace(tile, is_split=False)
    by_rows = dict.fromkeys(ROW_BUCKETS[:-1], tile) | {ROW_BUCKETS[-1]: last}
    return LinearTiles(block_k, splits, by_rows, by_rows, decoded_rows=1 << 30)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The same matrix in NF4 as files have it, as it is packed, and decoded to bfloat16."""

    matrix: Nf4Weight
    nf4: Nf4Linear
    dense: DenseLinear

    def product(self, candidate: Candidate, x: Tensor, y: Tensor, parts: Tensor) -> None:
        """``y = x Wᵀ`` by a candidate; arguments as in ``nf4_linear``."""
        tiles = _tiles(candidate.block_k, candidate.splits, candidate.tile)
        if candidate.is_dense:
            dense_linear(x, replace(self.dense, tiles=tiles), y, parts)
        else:
            nf4_linear(x, replace(self.nf4, tiles=tiles), y, parts)


def make_weights(
    shape: Shape,
    device: torch.device,
    sm: int,
    *,
    seed: int = 0,
    flattens: bool = False,
    decodes: bool = True,
) -> Weights:
    """Random weights of a shape; without ``decodes`` there is nothing in the dense ones."""
    generator = torch.Generator(device).manual_seed(seed)
    matrix = random_nf4(*shape, generator)
    packed = pack_linear("measured", [Linear(matrix)], sm, device, flattens=flattens)
    assert isinstance(packed, Nf4Linear)
    dense = torch.empty(shape if decodes else (0, shape[1]), dtype=torch.bfloat16, device=device)
    if decodes:
        nf4_dequantize(packed, dense)
    return Weights(matrix, packed, DenseLinear(dense, None, packed.tiles))


def num_parts(candidate: Candidate, rows: int) -> int:
    """Values of the workspace that a product needs."""
    is_split = candidate.tile.is_split and candidate.splits > 1 and bucket_of(rows) != ROW_BUCKETS[-1]
    return candidate.splits * rows * candidate.shape[0] if is_split else 0


def sm_of(device: torch.device) -> int:
    """Compute capability, such as 90; of the CPU's interpreter that of a card of today."""
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
