"""Launches bottleneck adapters at a sub-layer's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.deltas import shrink
from manyhats.engine.backends.cuda.adapters.layout import SublayerPlace
from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.adapters.step import (
    RANK_TILE,
    StepAdapters,
    Workspace,
    rank_tiles,
    split_of,
)
from manyhats.engine.backends.cuda.record import StreamNorm
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
    place: SublayerPlace,
    r: Tensor,
    m: Tensor,
    work: Workspace,
    norm: PlacedNorm = NO_NORM,
) -> None:
    """Put ``m'`` in the place of m, of each row whose adapter has a bottleneck there.

    Args:
        step: the step's adapters.
        place: the sub-layer.
        r: [N, D] float32, contiguous; the stream that entered the sub-layer.
        m: [N, D] float32, contiguous; its output, updated.
        work: the workspace.
        norm: of the stream.
    """
    if place.name not in step.acting.sublayers:
        return
    assert len(work.read) >= step.max_rows
    size, word = step.acting.bottleneck, place.word
    hidden_size, record = r.shape[1], step.records.stride(0)
    rows = step.rows, step.slots, step.num_rows, step.records, record, word, hidden_size
    normed = norm.weight, norm.bias, norm.eps
    options = {
        "NORM": int(norm.kind), "HAS_BIAS": norm.bias is not None, "BLOCK": _ROW_TILE, "enable_fp_fusion": True,
    }  # fmt: skip
    bottleneck.read[(step.max_rows,)](r, m, work.read, *rows, *normed, **options)
    shrink(step, work.read, work.inside, word, 1, size, gathers=False)
    bottleneck.widen[step.max_segments, -(-hidden_size // _OUTPUT_TILE)](
        work.inside, work.found, step.segments, step.num_segments, step.records, record, word, hidden_size,
        step.max_rows, rank_tiles(size) * RANK_TILE, SPLITS=split_of(hidden_size)[0],
        BM=SEGMENT_ROWS, BN=_OUTPUT_TILE, BR=RANK_TILE, enable_fp_fusion=True,
    )  # fmt: skip
    bottleneck.leave[(step.max_rows,)](r, m, work.found, *rows, *normed, **options)


def skip_norms(step: StepAdapters, place: SublayerPlace, r: Tensor, m: Tensor, stream: Tensor) -> None:
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
    hidden_size = r.shape[1]
    bottleneck.skip_norm[step.max_rows, -(-hidden_size // _ROW_TILE)](
        r, m, stream, step.rows, step.slots, step.num_rows, step.records, step.records.stride(0), place.word,
        hidden_size, BLOCK=_ROW_TILE, enable_fp_fusion=True,
    )  # fmt: skip
