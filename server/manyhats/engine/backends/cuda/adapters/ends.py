"""Launches what adapters do at the embedding and at the output head."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.deltas import expand, shrink
from manyhats.engine.backends.cuda.adapters.layout import RecordLayout
from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.adapters.step import INPUT_TILE, StepAdapters, Workspace
from manyhats.engine.backends.cuda.triton import ends

_EMBEDDING_TILE = 512
_TOKEN_TILE = 64


def change_embeddings(
    step: StepAdapters, layout: RecordLayout, token_ids: Tensor, hidden: Tensor, multiplier: float = 1.0
) -> None:
    """Give each row its own adapter's embedding.

    Args:
        step: the step's adapters.
        layout: of the records.
        token_ids: [N] int32; beyond the base's only where the row's adapter has a row of the id.
        hidden: [N, E] float32, contiguous: the base's embeddings times the multiplier; updated.
        multiplier: of embeddings.
    """
    if not step.acting.changes_embeddings:
        return
    size = hidden.shape[1]
    ends.change_embedding[step.max_rows, -(-size // _EMBEDDING_TILE)](
        token_ids, hidden, step.rows, step.slots, step.num_rows, step.records, step.records.stride(0),
        layout.embedding, size, multiplier, BLOCK=_EMBEDDING_TILE, enable_fp_fusion=True,
    )  # fmt: skip


def change_logits(
    step: StepAdapters, layout: RecordLayout, hidden: Tensor, logits: Tensor, work: Workspace
) -> None:
    """Give each row its own adapter's output head: a weight of its own, then rows, then a low-rank delta.

    Args:
        step: the adapters of the rows of logits, all with as many tokens as these have columns.
        layout: of the records.
        hidden: [M, E] bfloat16, contiguous; what the head reads.
        logits: [M, tokens] float32, contiguous: the base's, before any divisor or cap; updated.
        work: the workspace.
    """
    if not step.acting.changes_head:
        return
    _own_logits(step, layout.head_weight, step.acting.head_weight, hidden, logits)
    _own_logits(step, layout.head_rows, step.acting.head_rows, hidden, logits)
    rank, place = step.acting.head_rank, layout.head(logits.shape[1])
    if rank:
        shrink(step, hidden, work.inside, place.members, 1, rank, gathers=True)
        expand(step, logits, work, place, rank)


def _own_logits(step: StepAdapters, word: int, num_rows: int, hidden: Tensor, logits: Tensor) -> None:
    if not num_rows:
        return
    ends.own_logits[step.max_segments, -(-num_rows // _TOKEN_TILE)](
        hidden, logits, step.rows, step.segments, step.num_segments, step.records, step.records.stride(0), word,
        hidden.shape[1], logits.stride(0),
        BM=SEGMENT_ROWS, BN=_TOKEN_TILE, BK=INPUT_TILE, enable_fp_fusion=True,
    )  # fmt: skip
