"""The largest batch that a training runs on: of its data where that can be read, or of the longest rows allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhats.trainer.data.batch import TokenizedRow, TrainingBatch, collate
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.sampler import BatchSampler
from manyhats.trainer.settings.settings import OptimizationSettings

_MAX_STEPS = 1000
"""Steps of which the largest batch is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What memory depends on of a micro-batch.

    Attributes:
        num_tokens: N, a beginning that all rows share counted once.
        num_rows: B.
        longest: T, of a row, what is shared not counted.
        num_shared: S.
        num_targets: M.
        data_bytes: of all rows that stay in memory.
    """

    num_tokens: int
    num_rows: int
    longest: int
    num_shared: int = 0
    num_targets: int
    data_bytes: int = 0

    @property
    def num_padded(self) -> int:
        """B · T, which attention computes."""
        return self.num_rows * self.longest


def longest_rows(options: OptimizationSettings, length: int) -> BatchShape:
    """A batch of rows of one length, every token of them learned: no data of rows up to that length takes more."""
    num_rows = options.batch_size
    if options.batch_tokens is not None:
        num_rows = max(1, options.batch_tokens // length)
    return BatchShape(
        num_tokens=num_rows * length,
        num_rows=num_rows,
        longest=length,
        num_targets=num_rows * (length - 1),
    )


def largest_batch(data: Dataset, options: OptimizationSettings, *, shuffle: bool) -> BatchShape:
    """The largest micro-batch, of those with most tokens or most when padded, of up to 1,000 steps."""
    sampler = BatchSampler(data.rows, options, shuffle=shuffle)
    steps = range(min(sampler.num_steps, sampler.steps_per_epoch, _MAX_STEPS))
    batches = [rows for step in steps for rows in sampler.step(step)]
    candidates = [max(batches, key=_num_tokens), max(batches, key=_num_padded)]
    shapes = [_shape_of(collate(rows), data) for rows in candidates]
    return max(shapes, key=lambda shape: shape.num_tokens + shape.num_padded)


def _num_tokens(rows: Sequence[TokenizedRow]) -> int:
    return sum(len(row.token_ids) for row in rows)


def _num_padded(rows: Sequence[TokenizedRow]) -> int:
    return len(rows) * max(len(row.token_ids) for row in rows)


def _shape_of(batch: TrainingBatch, data: Dataset) -> BatchShape:
    segments = batch.segments[1:] if batch.num_shared else batch.segments
    return BatchShape(
        num_tokens=len(batch.token_ids),
        num_rows=len(segments),
        longest=max(segments),
        num_shared=batch.num_shared,
        num_targets=len(batch.targets),
        data_bytes=_data_bytes(data),
    )


def _data_bytes(data: Dataset) -> int:
    """Four bytes a token id and one for whether it is learned; of a row its bounds, line and prompt's length."""
    return 5 * data.rows.num_tokens + 20 * len(data.rows)
