"""The largest batch of a training run: from its data if that can be read, otherwise from the longest rows allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from manyhats.trainer.data.batch import TextBatch, TokenizedRow, TrainingBatch, TrainingRow, batch_of
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.head_rows import ReadDataset
from manyhats.trainer.data.sampler import BatchSampler
from manyhats.trainer.settings.settings import OptimizationSettings

_MAX_STEPS = 1000
"""How many steps are searched for the largest batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The properties of a micro-batch that determine memory use.

    Attributes:
        num_tokens: N, counting a beginning shared by all rows once.
        num_rows: B.
        longest: T, the length of the longest row, without what is shared.
        num_shared: S.
        num_targets: M, or the rows that a task's head reads.
        data_bytes: size of all rows, which stay in memory.
    """

    num_tokens: int
    num_rows: int
    longest: int
    num_shared: int = 0
    num_targets: int
    data_bytes: int = 0

    @property
    def num_padded(self) -> int:
        """B · T, the tokens that attention processes."""
        return self.num_rows * self.longest


def behind(batch: BatchShape, num_ahead: int) -> BatchShape:
    """A batch whose texts each have this many virtual tokens ahead of them, which run in the layers."""
    return replace(
        batch,
        num_tokens=batch.num_tokens + num_ahead * batch.num_rows,
        longest=batch.longest + num_ahead,
    )


def longest_rows(options: OptimizationSettings, length: int) -> BatchShape:
    """A batch of rows of the same length with every token learned: no data with rows up to that length needs more."""
    num_rows = options.batch_size
    if options.batch_tokens is not None:
        num_rows = max(1, options.batch_tokens // length)
    return BatchShape(
        num_tokens=num_rows * length,
        num_rows=num_rows,
        longest=length,
        num_targets=num_rows * (length - 1),
    )


def largest_batch(data: Dataset | ReadDataset, options: OptimizationSettings, *, shuffle: bool) -> BatchShape:
    """The largest micro-batch of up to 1,000 steps: the one with the most tokens, or with the most after padding."""
    sampler = BatchSampler(data.rows, options, shuffle=shuffle)
    steps = range(min(sampler.num_steps, sampler.steps_per_epoch, _MAX_STEPS))
    batches = [rows for step in steps for rows in sampler.step(step)]
    candidates = [max(batches, key=_num_tokens), max(batches, key=_num_padded)]
    shapes = [_shape_of(batch_of(rows), data) for rows in candidates]
    return max(shapes, key=lambda shape: shape.num_tokens + shape.num_padded)


def _num_tokens(rows: Sequence[TrainingRow]) -> int:
    return sum(row.num_tokens for row in rows)


def _num_padded(rows: Sequence[TrainingRow]) -> int:
    lengths = [length for row in rows for length in _lengths(row)]
    return len(lengths) * max(lengths)


def _lengths(row: TrainingRow) -> list[int]:
    return [row.num_tokens] if isinstance(row, TokenizedRow) else [len(text.token_ids) for text in row.texts]


def _shape_of(batch: TextBatch, data: Dataset | ReadDataset) -> BatchShape:
    segments = batch.segments[1:] if batch.num_shared else batch.segments
    return BatchShape(
        num_tokens=len(batch.token_ids),
        num_rows=len(segments),
        longest=max(segments),
        num_shared=batch.num_shared,
        num_targets=len(batch.targets) if isinstance(batch, TrainingBatch) else len(batch.token_ids),
        data_bytes=_data_bytes(data),
    )


def _data_bytes(data: Dataset | ReadDataset) -> int:
    """Four bytes per token id and one for whether it is learned, or its type; per row its bounds, line and the like."""
    return 5 * data.rows.num_tokens + 20 * len(data.rows)
