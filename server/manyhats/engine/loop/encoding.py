"""One encoding in the engine: the hidden values of texts, pooled, and what a head makes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.equations import layer_norm
from manyhats.adapters.heads import HeadLayer, Pooling, TaskHead, TaskKind
from manyhats.engine.backends.wants import Hidden
from manyhats.engine.errors import NumericalError
from manyhats.engine.loop.job import Answer, Want
from manyhats.engine.loop.meter import Meter
from manyhats.engine.loop.serving import ServingModel, new_sequence
from manyhats.engine.output import EncodeOutput
from manyhats.engine.request import EncodeRequest
from manyhats.engine.residency.lease import Lease
from manyhats.engine.scheduling.schedule import Chunk
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence

_MAX_QUEUED = 64
"""How many texts of one request are in the scheduler at a time; fewer if those fill a step."""


class Encoding:
    """A ``Job`` that reads texts, each in a sequence of its own, and generates nothing.

    Args:
        job_id: assigned by the engine.
        request: the texts.
        lease: of the adapter.
        model: the base.
        head: applied to what is pooled; None for the pooled values themselves.
        pooling: of each text's hidden rows.
    """

    def __init__(
        self,
        job_id: str,
        request: EncodeRequest,
        lease: Lease,
        model: ServingModel,
        head: TaskHead | None,
        pooling: Pooling,
    ) -> None:
        self.id = job_id
        self.deadline_s = request.deadline_s
        self.is_done = False
        self._request = request
        self._lease = lease
        self._model = model
        self._head = head
        self._pooling = pooling
        self._unqueued = deque(range(len(request.inputs)))
        self._running: dict[Sequence, tuple[int, Pooled]] = {}
        self._results: dict[int, Hidden] = {}
        self._is_bulk = False
        self._meter = Meter(request.accepted_s, request.num_tokens, lease.load_s)

    def next(self, scheduler: Scheduler, now_s: float) -> None:
        """Queue texts, at the first call; later ones are queued as others end."""
        if not self._running and not self._results:
            self._is_bulk = self._request.num_tokens > scheduler.config.max_num_batched_tokens
            self._queue(scheduler)

    def wants(self, chunk: Chunk) -> Want:
        """Nothing of logits; the sequences read hidden values."""
        self._meter.start(chunk.sequence.num_cached_tokens)
        return Want()

    def take(self, chunk: Chunk, answer: Answer, scheduler: Scheduler, now_s: float) -> EncodeOutput | None:
        """Keep what is pooled of a chunk's rows; answer when the last text has run.

        Raises:
            NumericalError: they are not finite, or what the head makes of them is not.
        """
        index, pooled = self._running[chunk.sequence]
        pooled.add(_finite(answer.hidden, "the hidden values"))
        if not chunk.ends_tokens:
            return None
        self._results[index] = _finite(applied(self._head, pooled.rows()), "the outputs of the task's head")
        del self._running[chunk.sequence]
        scheduler.finish(chunk.sequence)
        self._queue(scheduler, now_s)
        if self._running:
            return None
        self.is_done = True
        self._meter.end_prefill(now_s)
        found = tuple(self._results[index] for index in range(len(self._request.inputs)))
        return EncodeOutput(found, self._meter.usage(now_s))

    def drop(self, scheduler: Scheduler) -> None:
        """Free every sequence's blocks."""
        for sequence in self._running:
            scheduler.finish(sequence, is_answered=False)

    def _queue(self, scheduler: Scheduler, now_s: float | None = None) -> None:
        """Queue enough for a step; all but the first as if they arrived now: earlier requests have their turn first."""
        limit = scheduler.config.max_num_batched_tokens
        while self._unqueued and len(self._running) < _MAX_QUEUED:
            if self._running and sum(sequence.num_left for sequence in self._running) >= limit:
                return
            index = self._unqueued.popleft()
            row = _row_of(self._request.inputs[index], self._head, self._pooling)
            sequence = self._sequence(index, row)
            if index:
                sequence.is_continuation = True
            if now_s is not None:
                sequence.arrival = now_s
            self._running[sequence] = index, Pooled(self._pooling, row)
            scheduler.add(sequence)

    def _sequence(self, index: int, row: int | None) -> Sequence:
        token_ids = self._request.inputs[index]
        sequence = new_sequence(self.id, self._request, token_ids, 0, self._lease, self._model)
        sequence.reads_hidden = True
        if self._model.sees_all:
            self._make_whole(sequence, index)
        else:
            sequence.is_bulk = self._is_bulk
        if row != len(token_ids) - 1:
            sequence.logits_from = self._lease.num_virtual_tokens + (0 if row is None else row)
            sequence.uses_prefix_cache = row is not None and row > 0 and not sequence.is_whole
        is_classified = self._head is not None and self._head.kind is TaskKind.CLASSIFY
        are_read = sequence.leading is not None and sequence.leading.are_read
        if are_read and (self._pooling is Pooling.FIRST or is_classified):
            sequence.logits_from = 0  # the libraries' models read the first row, or all, whatever they are
        return sequence

    def _make_whole(self, sequence: Sequence, index: int) -> None:
        """All tokens in one step: virtual ones that are vectors depend on the text, and are nobody else's prefix."""
        sequence.is_whole, sequence.uses_prefix_cache = True, False
        num_virtual, virtual = self._lease.num_virtual_tokens, sequence.virtual
        if self._request.token_types:
            sequence.token_types = (0,) * num_virtual + self._request.token_types[index]
        if virtual is not None and virtual.embeddings is not None:
            sequence.leading, sequence.virtual = virtual, None


def _row_of(token_ids: Seq[int], head: TaskHead | None, pooling: Pooling) -> int | None:
    """The one row of a text's tokens that is pooled; None for all of them."""
    if pooling is Pooling.FIRST:
        return 0
    if pooling is not Pooling.LAST:
        return None
    skipped = None if head is None else head.skipped_token_id
    kept = (index for index in range(len(token_ids) - 1, -1, -1) if token_ids[index] != skipped)
    return next(kept, 0)


class Pooled:
    """Hidden rows as they come, in order; sums are float64, row by row, so that no cut of the text shows.

    Args:
        pooling: of all rows.
        row: the one that is wanted, where the first row to come is; None for all.
    """

    def __init__(self, pooling: Pooling, row: int | None) -> None:
        self._pooling = pooling
        self._is_one = row is not None
        self._parts: list[Hidden] = []
        self._sum: npt.NDArray[np.float64] | None = None
        self._num_rows = 0

    def add(self, rows: Hidden) -> None:
        """More rows, [R, E]."""
        if not rows.shape[0]:
            return
        if self._is_one:
            self._parts = self._parts or [rows[:1].copy()]
        elif self._pooling is Pooling.MEAN:
            values = rows.astype(np.float64)
            if self._sum is not None:
                values = np.concatenate((self._sum[None], values))
            self._sum = np.add.reduce(values, axis=0)
            self._num_rows += rows.shape[0]
        elif self._pooling is Pooling.MAX:
            self._parts = [np.concatenate([*self._parts, rows]).max(axis=0, keepdims=True)]
        else:
            self._parts.append(rows.copy())

    def rows(self) -> Hidden:
        """What is pooled: [1, E], or every row."""
        if self._sum is not None:
            return (self._sum / self._num_rows).astype(np.float32)[None]
        return np.concatenate(self._parts)


def _finite(values: Hidden, what: str) -> Hidden:
    if not np.isfinite(values).all():
        raise NumericalError(f"{what} are not finite")
    return values


def applied(head: TaskHead | None, rows: Hidden) -> Hidden:
    """What a head makes of pooled rows, each by itself: [R, E] → [R, outputs]; float32 throughout."""
    if head is None or not head.layers:
        return rows
    with torch.inference_mode():
        return np.stack([_one(head.layers, torch.from_numpy(row)).numpy() for row in rows])


def _one(layers: Seq[HeadLayer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer.weight @ x
        if layer.bias is not None:
            x = x + layer.bias
        if layer.activation is not None:
            x = ACTIVATIONS[layer.activation](x)
        if layer.norm is not None:
            x = layer_norm(x, layer.norm)
    return x
