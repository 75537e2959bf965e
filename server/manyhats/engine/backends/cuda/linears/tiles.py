"""How the products of linears are cut into tiles, by GPU, shape of the weights and number of rows.

A row has the same bits in every batch because how K is cut depends on the weights' shape alone: ``LinearTiles`` has it
once, for all numbers of rows. The rest only says which programs share the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROW_BUCKETS = (16, 32, 64, 128, 256)
"""Numbers of rows up to which tiles are chosen; the last ones serve any more. Hopper's instruction needs 16."""
BLOCK = 64
"""Weights that share one absmax; K is cut at its multiples."""
MAX_SPLITS = 8
DECODED_ROWS = 512
"""From here on, decoding NF4 weights once costs less than doing so for each tile of rows; not measured on a GPU."""


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Tiles for one number of rows; nothing here changes a bit of a result.

    Attributes:
        rows: of the batch, of one program; the tensor cores' N side.
        weights: rows of weights of one program; their M side, of which Hopper's instruction needs 64.
        num_warps: of one program.
        num_stages: of the pipeline along K.
        is_split: whether each range of K has a program of its own, and a second kernel adds their sums.
        gathers: whether NF4 codes are looked up in registers rather than in memory, where each access of a pipelined
            loop would become a copy of four bytes.
    """

    rows: int
    weights: int
    num_warps: int
    num_stages: int
    is_split: bool = False
    gathers: bool = True

    def __post_init__(self) -> None:
        for size, least in ((self.rows, 16), (self.weights, 64)):
            if size < least or size & (size - 1):
                raise ValueError(f"a tile of {size}: a power of two from {least} is expected")


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """Tiles for weights of one shape, whatever the number of rows.

    Attributes:
        block_k: values of K of one step; a power of two from 64, a divisor of NF4's K.
        splits: ranges of K, of as many steps each, that are summed by themselves.
        nf4: by the bucket of the number of rows; those of the last one are not split.
        dense: likewise.
        decoded_rows: from how many rows NF4 weights are decoded first, and multiplied as dense ones.
    """

    block_k: int
    splits: int
    nf4: Mapping[int, RowTiles]
    dense: Mapping[int, RowTiles]
    decoded_rows: int = DECODED_ROWS

    def __post_init__(self) -> None:
        if self.block_k < BLOCK or self.block_k & (self.block_k - 1):
            raise ValueError(f"steps of {self.block_k}: a power of two from {BLOCK} is expected")
        for tiles in (self.nf4, self.dense):
            if tuple(sorted(tiles)) != ROW_BUCKETS or tiles[ROW_BUCKETS[-1]].is_split:
                raise ValueError(f"tiles for each of {ROW_BUCKETS} are expected, the last ones not split")

    def num_steps(self, in_features: int) -> int:
        """Steps of each range of K."""
        return -(-in_features // self.block_k) // self.splits

    def fits(self, in_features: int) -> bool:
        """Whether the ranges are all of K; only steps of 64 may go beyond it, for dense weights."""
        is_whole = in_features % self.block_k == 0 or self.block_k == BLOCK
        return is_whole and self.num_steps(in_features) * self.splits == -(-in_features // self.block_k)

    def num_partial_rows(self, max_rows: int) -> int:
        """The largest number of rows, of those up to ``max_rows``, whose sums are kept apart; 0 for none."""
        if self.splits == 1:
            return 0
        split = (bucket for tiles in (self.nf4, self.dense) for bucket in tiles if tiles[bucket].is_split)
        return min(max_rows, max(split, default=0))


def bucket_of(num_rows: int) -> int:
    """The least bucket that has room for so many rows, or the last one."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), ROW_BUCKETS[-1])


MEASURED: Mapping[tuple[int, int, int], LinearTiles] = {}
"""What was fastest, by compute capability (such as 90), output and input features. No shape was measured yet."""


def tiles_for(
    sm: int,
    out_features: int,
    in_features: int,
    measured: Mapping[tuple[int, int, int], LinearTiles] = MEASURED,
) -> LinearTiles:
    """Those measured for a GPU and a shape of weights, or what the rule for all shapes gives.

    Raises:
        ValueError: those measured do not fit the shape.
    """
    found = measured.get((sm, out_features, in_features))
    if found is None:
        splits = default_splits(out_features, in_features)
        nf4, dense = (_HOPPER_NF4, _hopper_dense(splits)) if sm // 10 == 9 else (_OTHER_NF4, _OTHER_DENSE)
        return LinearTiles(BLOCK, splits, nf4, dense)
    if not found.fits(in_features):
        raise ValueError(f"{in_features} inputs in {found.splits} ranges of steps of {found.block_k}")
    return found


def default_splits(out_features: int, in_features: int) -> int:
    """The fewest ranges of K, of at least 512 values, that make 256 programs: two for each processor of a large GPU.

    If that takes too many, as many as there may be. They are alike: a divisor of the number of steps.
    """
    num_steps, num_programs = -(-in_features // BLOCK), -(-out_features // BLOCK)
    possible = [
        splits
        for splits in range(1, MAX_SPLITS + 1)
        if num_steps % splits == 0 and (splits == 1 or num_steps // splits * BLOCK >= 512)
    ]
    return next((splits for splits in possible if splits * num_programs >= 256), possible[-1])


# As many stages and as large tiles as compile without spills for the least shared memory of each, 99 and 227 KB; their
# speed was not measured on a GPU.
_FEW_NF4 = {
    16: RowTiles(16, 64, 4, 4, is_split=True),
    32: RowTiles(32, 64, 4, 4, is_split=True),
    64: RowTiles(64, 64, 4, 3, is_split=True),
}
_FEW_DENSE = {
    16: RowTiles(16, 64, 4, 5, is_split=True),
    32: RowTiles(32, 64, 4, 5, is_split=True),
    64: RowTiles(64, 64, 4, 4, is_split=True),
}
_OTHER_NF4 = {**_FEW_NF4, 128: RowTiles(128, 64, 8, 3, is_split=True), 256: RowTiles(128, 64, 8, 2)}
_OTHER_DENSE = {**_FEW_DENSE, 128: RowTiles(128, 64, 8, 3, is_split=True), 256: RowTiles(128, 128, 8, 3)}
_HOPPER_NF4 = {**_FEW_NF4, 128: RowTiles(128, 64, 4, 3, is_split=True), 256: RowTiles(128, 128, 8, 3)}


def _hopper_dense(splits: int) -> Mapping[int, RowTiles]:
    # A second sum, of the ranges' own, leaves no registers for the widest instruction.
    most = RowTiles(256 if splits == 1 else 128, 128, 8, 3)
    return {**_FEW_DENSE, 128: RowTiles(128, 64, 4, 4, is_split=True), 256: most}
