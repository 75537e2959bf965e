"""Launches what adapters do at linears."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.layout import GroupPlace
from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.adapters.step import (
    INPUT_TILE,
    RANK_TILE,
    StepAdapters,
    Workspace,
    rank_tiles,
    split_of,
)
from manyhats.engine.backends.cuda.record import GATES, MAX_MEMBERS
from manyhats.engine.backends.cuda.triton import deltas

_OUTPUT_TILE = 128
_SCALE_TILE = 512


def scale_inputs(step: StepAdapters, place: GroupPlace, x: Tensor) -> None:
    """Rescale the inputs of a group in place, before the base's linears read them.

    Args:
        step: the step's adapters.
        place: the group.
        x: [N, K] bfloat16 or float32, contiguous.
    """
    if place.name not in step.acting.inputs:
        return
    grid = (step.max_segments, -(-place.d_in // _SCALE_TILE))
    deltas.scale_inputs[grid](
        x, step.rows, step.segments, step.num_segments, step.records, step.records.stride(0), place.input_scale,
        place.d_in, BM=SEGMENT_ROWS, BK=_SCALE_TILE, enable_fp_fusion=True,
    )  # fmt: skip


def change_outputs(step: StepAdapters, place: GroupPlace, x: Tensor, y: Tensor, work: Workspace) -> None:
    """Rescale and shift the outputs of a group's linears, and add their low-rank deltas, by gates that are known.

    Args:
        step: the step's adapters.
        place: the group.
        x: [N, K] bfloat16, contiguous: the inputs.
        y: [N, outputs side by side] bfloat16 or float32, contiguous: the outputs, biases included; updated.
        work: the workspace.
    """
    if place.name not in step.acting.outputs:
        return
    shrink(step, x, work.inside, place.members, len(place.sizes), step.acting.rank, gathers=True)
    expand(step, y, work, place, step.acting.rank)


def shrink(
    step: StepAdapters,
    x: Tensor,
    inside: Tensor,
    word: int,
    num_parts: int,
    rank: int,
    *,
    gathers: bool,
) -> None:
    """The first product of low-rank deltas, or of bottlenecks, whose inputs are in the order of the step's places.

    Args:
        step: the step's adapters.
        x: [N or places, K] bfloat16.
        inside: where the ranges' sums go.
        word: the first part's first word in a record.
        num_parts: linears side by side.
        rank: the largest.
        gathers: whether x has all rows of the step.
    """
    num_inputs = x.shape[1]
    tiles, (num_splits, split) = rank_tiles(rank), split_of(num_inputs)
    if not tiles:
        return
    assert inside.numel() >= num_splits * step.max_rows * num_parts * tiles * RANK_TILE
    deltas.shrink[step.max_segments, num_parts, num_splits * tiles](
        x, inside, step.rows, step.segments, step.num_segments, step.records, step.records.stride(0), word,
        num_inputs, split, step.max_rows, tiles * RANK_TILE,
        PARTS=num_parts, SPLITS=num_splits, GATHERS=gathers,
        BM=SEGMENT_ROWS, BK=INPUT_TILE, BR=RANK_TILE, enable_fp_fusion=True,
    )  # fmt: skip


def expand(step: StepAdapters, y: Tensor, work: Workspace, place: GroupPlace, rank: int) -> None:
    """What ``shrink`` left, times the second matrices, with factors and offsets: into y, as in ``change_outputs``.

    Without fused multiply-adds, so that a row has the same bits whether or not others of its step have gates.
    """
    sizes = (*place.sizes, *(0,) * (MAX_MEMBERS - len(place.sizes)))
    num_splits, _ = split_of(place.d_in)
    grid = (step.max_segments, len(place.sizes), -(-max(sizes) // _OUTPUT_TILE))
    deltas.expand[grid](
        work.inside, y, work.gates, step.rows, step.segments, step.num_segments, step.records, step.records.stride(0),
        place.members, y.stride(0), *sizes, step.max_rows, rank_tiles(rank) * RANK_TILE,
        PARTS=len(place.sizes), SPLITS=num_splits, GATES=GATES if place.name in step.acting.gates else 0,
        BM=SEGMENT_ROWS, BN=_OUTPUT_TILE, BR=RANK_TILE, enable_fp_fusion=False,
    )  # fmt: skip
