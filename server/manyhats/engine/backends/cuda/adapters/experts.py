"""Launches what adapters do at experts."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.adapters.step import (
    INPUT_TILE,
    RANK_TILE,
    StepAdapters,
    Workspace,
    rank_tiles,
)
from manyhats.engine.backends.cuda.experts.routing import SortedPairs
from manyhats.engine.backends.cuda.record import EXPERT_MEMBERS
from manyhats.engine.backends.cuda.triton import expert_deltas

_OUTPUT_TILE = 128


def change_experts(
    step: StepAdapters,
    word: int,
    pairs: SortedPairs,
    names: tuple[str, ...],
    x: Tensor,
    y: Tensor,
    work: Workspace,
) -> None:
    """Add the low-rank deltas of experts' linears, to each pair its own adapter's.

    Args:
        step: the step's adapters.
        word: of the layer's table of experts.
        pairs: of the step's places, in tiles of ``SEGMENT_ROWS``.
        names: of the linears that are side by side, as an expert names them.
        x: [N, K] bfloat16, what all of a row's experts read, or [N · k, K], of each pair; contiguous.
        y: [N · k, linears' outputs side by side] bfloat16 or float32, contiguous; updated.
        work: the workspace.
    """
    num_parts, tiles = len(names), rank_tiles(step.acting.expert_rank)
    num_chosen, size = pairs.pairs.shape[0] // step.max_rows, y.shape[1] // len(names)
    ranks = tiles * RANK_TILE
    assert work.inside.numel() >= pairs.pairs.shape[0] * num_parts * ranks
    at = (
        pairs.pairs,
        pairs.tiles,
        pairs.num_tiles,
        step.rows,
        step.slots,
        step.records,
        step.records.stride(0),
        word,
    )
    cut = {"MEMBER": EXPERT_MEMBERS.index(names[0]), "PARTS": num_parts, "TOP": num_chosen}
    expert_deltas.shrink_experts[pairs.max_tiles, num_parts, tiles](
        x, work.inside, *at, x.shape[1], ranks, **cut, IS_OF_PAIRS=x.shape[0] == y.shape[0],
        BM=SEGMENT_ROWS, BK=INPUT_TILE, BR=RANK_TILE, enable_fp_fusion=True,
    )  # fmt: skip
    expert_deltas.expand_experts[pairs.max_tiles, num_parts, -(-size // _OUTPUT_TILE)](
        work.inside, y, *at, size, ranks, **cut,
        BM=SEGMENT_ROWS, BN=_OUTPUT_TILE, BR=RANK_TILE, enable_fp_fusion=True,
    )  # fmt: skip
