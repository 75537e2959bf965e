"""Which rows each optimizer step takes: a pure function of the seed and the step's index.

An epoch is shuffled, cut into windows of a few batches, and each window sorted by length, so that a batch's rows are of
similar length; then the batches are shuffled. Windows are sorted alternately upwards and downwards, so that a batch on
the border of two has similar lengths too.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from manyhats.trainer.data.batch import TrainingRow
from manyhats.trainer.data.dataset import TokenizedRows
from manyhats.trainer.data.head_rows import ReadRows
from manyhats.trainer.settings.settings import OptimizationSettings

TrainingRows = TokenizedRows | ReadRows
"""Rows in memory, whatever is learned of them."""

RowT = TypeVar("RowT", bound=TrainingRow)

_WINDOW_BATCHES = 16

_Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _EpochPlan:
    """The micro-batches of one epoch: the m-th has rows ``order[bounds[i] : bounds[i + 1]]``, ``i = sequence[m]``."""

    order: _Integers
    bounds: _Integers
    sequence: _Integers

    @property
    def num_micro_batches(self) -> int:
        return len(self.sequence)

    def micro_batch(self, index: int) -> list[int]:
        """TrainingRow numbers."""
        place = self.sequence[index]
        rows: list[int] = self.order[self.bounds[place] : self.bounds[place + 1]].tolist()
        return rows


class BatchSampler(Generic[RowT]):
    """The steps of a run over some rows.

    Every row appears once per epoch. A step never takes rows of two epochs, so an epoch's last step may have fewer
    micro-batches, and one micro-batch of an epoch may be short. A fractional last epoch has that fraction of its steps,
    rounded up.

    Args:
        rows: at least one.
        settings: ``batch_size`` rows to a micro-batch, or up to ``batch_tokens`` tokens (a longer row has its own), and
            ``gradient_accumulation`` micro-batches to a step.
        shuffle: if false, every epoch takes the rows in their order.

    Attributes:
        num_steps: of the whole run, including ``max_steps``.
        steps_per_epoch: of the first epoch; with ``batch_tokens`` others may have a few more or less.
    """

    def __init__(self, rows: Sequence[RowT], settings: OptimizationSettings, *, shuffle: bool) -> None:
        self._rows = rows
        self._lengths = _lengths(rows)
        self._settings = settings
        self._shuffle = shuffle
        self._planned: tuple[int, _EpochPlan] = (0, self._make_plan(0))
        self.steps_per_epoch = self._num_steps_of(0)
        self._ends = self._epoch_ends()
        self.num_steps = self._ends[-1]

    def step(self, index: int) -> list[list[RowT]]:
        """The micro-batches of an optimizer step.

        Args:
            index: from 0, below ``num_steps``.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index}: the run has {self.num_steps}")
        epoch = self.epoch_of(index)
        plan = self._plan(epoch)
        first = (index - self._begin(epoch)) * self._settings.gradient_accumulation
        end = min(first + self._settings.gradient_accumulation, plan.num_micro_batches)
        return [[self._rows[row] for row in plan.micro_batch(each)] for each in range(first, end)]

    def epoch_of(self, index: int) -> int:
        """The epoch of a step, from 0."""
        return bisect.bisect_right(self._ends, index)

    def epochs_after(self, index: int) -> float:
        """Passes over the rows when a step is done, a fraction within one."""
        epoch = self.epoch_of(index)
        return epoch + (index + 1 - self._begin(epoch)) / self._num_steps_of(epoch)

    def ends_epoch(self, index: int) -> bool:
        """Whether a step is the last of its epoch, or of the run."""
        return index + 1 == self._ends[self.epoch_of(index)]

    def _begin(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0

    def _epoch_ends(self) -> list[int]:
        """For each epoch, even a partial one, the number of steps up to its end."""
        ends: list[int] = []
        limit = self._settings.max_steps
        while limit is None or not ends or ends[-1] < limit:
            share = min(1.0, self._settings.epochs - len(ends))
            # A product such as 0.7 · 10 must not round up to 8.
            num_steps = math.ceil(self._num_steps_of(len(ends)) * share - 1e-9)
            if num_steps < 1 and ends:
                break
            ends.append((ends[-1] if ends else 0) + max(num_steps, 1))
        if limit is not None:
            ends[-1] = min(ends[-1], limit)
        return ends

    def _num_steps_of(self, epoch: int) -> int:
        if self._settings.batch_tokens is None:
            num_micro_batches = -(-len(self._rows) // self._settings.batch_size)
        else:
            num_micro_batches = self._plan(epoch).num_micro_batches
        return -(-num_micro_batches // self._settings.gradient_accumulation)

    def _plan(self, epoch: int) -> _EpochPlan:
        """The epoch's plan; the latest is cached."""
        if self._planned[0] != epoch:
            self._planned = (epoch, self._make_plan(epoch))
        return self._planned[1]

    def _make_plan(self, epoch: int) -> _EpochPlan:
        if not self._shuffle:
            order = np.arange(len(self._rows))
            bounds = _bounds(self._lengths, self._settings)
            return _EpochPlan(order, bounds, np.arange(len(bounds) - 1))
        seed = self._settings.seed
        shuffled = _permutation(len(self._rows), seed, epoch, 0)
        order = _sorted_in_windows(shuffled, self._lengths, _window(self._lengths, self._settings))
        bounds = _bounds(self._lengths[order], self._settings)
        return _EpochPlan(order, bounds, _permutation(len(bounds) - 1, seed, epoch, 1))


def evaluation_batches(
    rows: Sequence[TrainingRow], settings: OptimizationSettings
) -> Iterator[list[TrainingRow]]:
    """Every row once, in batches of ``batch_size`` rows or ``batch_tokens`` tokens, longest rows first.

    So if memory runs out, it does so at the start.
    """
    lengths = _lengths(rows)
    order = np.argsort(-lengths, kind="stable")
    bounds = _bounds(lengths[order], settings).tolist()
    for begin, end in pairwise(bounds):
        yield [rows[row] for row in order[begin:end].tolist()]


def _lengths(rows: Sequence[TrainingRow]) -> _Integers:
    if isinstance(rows, TrainingRows):
        return rows.lengths
    return np.array([row.num_tokens for row in rows], dtype=np.int64)


def _permutation(length: int, *seeds: int) -> _Integers:
    """A permutation of 0 … length − 1 from seeds.

    Sorts raw bits: NumPy guarantees a bit generator's bits, not how its ``permutation`` uses them, and a run may be
    resumed after an update.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(length)
    return np.argsort(bits, kind="stable")


def _window(lengths: _Integers, settings: OptimizationSettings) -> int:
    """How many rows are sorted together: a few batches, and at most a quarter of all, so that epochs differ."""
    if settings.batch_tokens is None:
        rows_per_batch = settings.batch_size
    else:
        rows_per_batch = max(1, int(settings.batch_tokens // lengths.mean()))
    return max(rows_per_batch, min(_WINDOW_BATCHES * rows_per_batch, len(lengths) // 4))


def _sorted_in_windows(order: _Integers, lengths: _Integers, window: int) -> _Integers:
    """Rows of each window by length, alternately upwards and downwards; equal ones stay as shuffled."""
    place = np.arange(len(order)) // window
    signed = np.where(place % 2 == 0, lengths[order], -lengths[order])
    return order[np.lexsort((signed, place))]


def _bounds(lengths: _Integers, settings: OptimizationSettings) -> _Integers:
    """Where micro-batches begin in rows of these lengths, and the end."""
    if settings.batch_tokens is None:
        return np.append(np.arange(0, len(lengths), settings.batch_size), len(lengths))
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        begin = bounds[-1]
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + settings.batch_tokens, side="right"))
        bounds.append(max(end, begin + 1))
    return np.array(bounds)
