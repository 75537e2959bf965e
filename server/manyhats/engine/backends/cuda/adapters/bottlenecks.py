"""Launches bottleneck adapters at sub-layers' outputs, and elsewhere on the stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.deltas import shrink
from manyhats.engine.backends.cuda.adapters.gates import close_gates
from manyhats.engine.backends.cuda.adapters.layout import StreamPlace
from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.adapters.step import (
    RANK_TILE,
    StepAdapters,
    Workspace,
    rank_tiles,
    split_of,
)
from manyhats.engine.backends.cuda.record import BottleneckWord, StreamNorm
from manyhats.engine.backends.cuda.triton import bottleneck

_ROW_TILE = 1024
_OUTPUT_TILE = 128


@dataclass(frozen=True, slots=True, eq=False)
class PlacedNorm:
    """The norm of the stream behind a sub-layer: weight [D], and bias [D] or None, float32 on the device."""

    kind: StreamNorm
    weight: Tensor | None
    bias: Tensor | None
    eps: float


NO_NORM = PlacedNorm(StreamNorm.NONE, None, None, 0.0)
"""That of a base that has none there."""


def change_output(
    step: StepAdapters,
    place: StreamPlace,
    r: Tensor,
    m: Tensor,
    work: Workspace,
    norm: PlacedNorm = NO_NORM,
) -> None:
    """Put ``m'`` in the place of m, of each row whose adapter has a bottleneck there.

    Without fused multiply-adds, so that a row has the same bits whether or not others of its step have gates, or ends.

    Args:
        step: the step's adapters.
        place: the sub-layer.
        r: [N, D] float32, contiguous; the stream that entered the sub-layer.
        m: [N, D] float32, contiguous; its output, updated. Elsewhere on the stream both are the stream.
        work: the workspace.
        norm: of the stream.
    """
    if place.name not in step.acting.sublayers:
        return
    assert work.read.numel() >= step.max_rows * place.size
    has_gates, (within, has_ends) = place.name in step.acting.gates, step.within(place.name)
    size, tiles = step.acting.bottleneck, rank_tiles(step.acting.bottleneck)
    where = step.records.stride(0), place.word, place.size
    normed = norm.weight, norm.bias, norm.eps
    of_norm = {"NORM": int(norm.kind), "HAS_BIAS": norm.bias is not None, "BLOCK": _ROW_TILE}
    bottleneck.read[(step.max_rows,)](
        r, m, work.read, work.gates, *step.of_rows, *where, *normed,
        **of_norm, HAS_GATES=has_gates, enable_fp_fusion=False,
    )  # fmt: skip
    if has_gates:
        close_gates(step, place.word + BottleneckWord.GATE, 1, work)
    x = work.read[: step.max_rows * place.size].view(-1, place.size)
    shrink(step, x, work.inside, place.word, 1, size, gathers=False)
    bottleneck.widen[step.max_segments, -(-place.size // _OUTPUT_TILE)](
        work.inside, work.found, work.gates, within, step.segments, step.num_segments, step.records, *where,
        step.max_rows, tiles * RANK_TILE, SPLITS=split_of(place.size)[0], HAS_GATES=has_gates, HAS_ENDS=has_ends,
        BM=SEGMENT_ROWS, BN=_OUTPUT_TILE, BR=RANK_TILE, enable_fp_fusion=False,
    )  # fmt: skip
    bottleneck.leave[(step.max_rows,)](
        r, m, work.found, within, *step.of_rows, *where, *normed,
        **of_norm, HAS_ENDS=has_ends, enable_fp_fusion=False,
    )  # fmt: skip


def change_stream(step: StepAdapters, place: StreamPlace, stream: Tensor, work: Workspace) -> None:
    """Change the stream behind an encoder's layer, or its normed embeddings; [N, D] float32, contiguous."""
    change_output(step, place, stream, stream, work)


def skip_norms(step: StepAdapters, place: StreamPlace, r: Tensor, m: Tensor, stream: Tensor) -> None:
    """Give rows whose adapter skips the norm of the stream ``r + m'``, once the stream of all rows is normed.

    Args:
        step: the step's adapters.
        place: the sub-layer.
        r: [N, D] float32; the stream that entered the sub-layer.
        m: [N, D] float32; its output as ``change_output`` left it.
        stream: [N, D] float32, ``N(r + m)``; updated.
    """
    if place.name not in step.acting.norms_skipped:
        return
    within, has_ends = step.within(place.name)
    bottleneck.skip_norm[step.max_rows, -(-place.size // _ROW_TILE)](
        r, m, stream, within, *step.of_rows, step.records.stride(0), place.word, place.size,
        HAS_ENDS=has_ends, BLOCK=_ROW_TILE, enable_fp_fusion=False,
    )  # fmt: skip
