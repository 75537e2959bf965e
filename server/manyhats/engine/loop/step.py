"""The engine's loop body: schedule → plan → forward → finish → take. One thread owns it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from manyhats.adapters.primitives import KVPrefix
from manyhats.engine.backends.backend import AdapterSlots, KVCache, Model
from manyhats.engine.backends.wants import Outcome, check_ids
from manyhats.engine.errors import (
    DeadlineExceededError,
    EngineError,
    NoMemoryError,
    NumericalError,
    RequestCancelledError,
    RequestFailedError,
    is_out_of_memory,
)
from manyhats.engine.loop.job import Event, Job, Want
from manyhats.engine.loop.parts import Part, answers_of, wants_of
from manyhats.engine.loop.plan import step_plan
from manyhats.engine.loop.watch import Allowance
from manyhats.engine.output import StepStats
from manyhats.engine.sampling.sampler import check_row
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence

_MAX_FAILED_STEPS = 8
"""In a row: if no step succeeds any more, the engine is useless."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step reports to callers, and its statistics.

    Attributes:
        events: for the callers.
        stats: None if nothing ran.
        is_stuck: jobs are left but none made progress, which should not happen.
    """

    events: tuple[Event, ...]
    stats: StepStats | None
    is_stuck: bool = False


class Step:
    """Runs jobs to their end. Not thread-safe; ``Loop`` runs it on a thread.

    An exception from a job ends only that job; one from the step as a whole, such as the forward, ends the step's jobs,
    but if there was no memory for it, only the newest.
    One from the scheduler ends all jobs, since it may be in any state: it then starts over.

    Attributes:
        allowance: how long the step that runs may take.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: Model[Any, Any],
        cache: KVCache,
        adapters: AdapterSlots[Any],
        vocab_size: int,
    ) -> None:
        self.scheduler = scheduler
        self._model = model
        self._cache = cache
        self._adapters = adapters
        self._vocab_size = vocab_size
        self._jobs: dict[str, Job[Any]] = {}
        self._num_failed_steps = 0  # since the last one that succeeded
        self.allowance = Allowance()

    @property
    def has_work(self) -> bool:
        """Whether any job is unfinished."""
        return bool(self._jobs)

    @property
    def is_idle(self) -> bool:
        """Whether nothing can run: there is no job, or each waits for its reader or for its task's limits."""
        return self.scheduler.num_paused == len(self._jobs) or self.scheduler.is_held_back

    def add(self, job: Job[Any]) -> tuple[Event, ...]:
        """Accept a job; if it cannot, the event says why."""
        events: list[Event] = []
        with self._together(events):
            self._jobs[job.id] = job
            self._next(job, time.monotonic(), events)
        return tuple(events)

    def cancel(self, job_id: str) -> tuple[Event, ...]:
        """End a job at once; its blocks are free on return. Unknown ids are ignored."""
        events: list[Event] = []
        job = self._jobs.get(job_id)
        if job is not None:
            with self._together(events):
                events.append(self._fail(job, RequestCancelledError("cancelled")))
        return tuple(events)

    def run(self) -> StepResult:
        """Take one turn: end what has reached a time limit, then run the next batch, if there is one.

        Raises:
            Exception: the step failed as a whole, as did several before it in a row.
        """
        events: list[Event] = []
        try:
            return self._run(events)
        except Exception as error:
            self._start_over(error, events)
            if self._num_failed_steps >= _MAX_FAILED_STEPS:
                raise
            return StepResult(tuple(events), None)

    def _run(self, events: list[Event]) -> StepResult:
        started = time.monotonic()
        num_jobs = len(self._jobs)
        self._tick(started, events)
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            self._refuse(schedule.hopeless, events)
            is_stuck = not events and len(self._jobs) == num_jobs and not self.is_idle
            return StepResult(tuple(events), None, is_stuck)
        is_computed = False
        self.allowance.begin(schedule.num_tokens)
        try:
            plan = step_plan(schedule, self._cache.block_size)  # while every sequence has its blocks
            parts = self._parts(schedule, events)
            self._fill_prefixes(schedule)
            logits = self._model.forward(plan, self._cache, self._adapters)
            wants = wants_of(list(self._live(parts)), self._vocab_size)
            outcome = logits.finish(wants).result()
            is_computed = True
            self._commit(schedule, parts, outcome, events)
        except Exception as error:  # noqa: BLE001 whatever it is, requests beyond this step have no part in it
            if is_out_of_memory(error) and not is_computed:
                self._shed(schedule, error, events)
            else:
                self._fail_step(schedule, error, events)
            return StepResult(tuple(events), None)
        self._refuse(schedule.hopeless, events)  # not before: others of their jobs may be in the step
        self._num_failed_steps = 0
        elapsed_s = time.monotonic() - started
        self.allowance.end(elapsed_s)
        return StepResult(tuple(events), _stats(schedule, elapsed_s))

    def _fill_prefixes(self, schedule: Schedule) -> None:
        for fill in schedule.prefix_fills:
            if isinstance(source := fill.virtual.source, KVPrefix):
                keys, values = (part[:, fill.first_token :] for part in (source.keys, source.values))
                self._cache.write(fill.block_ids, keys, values)

    def drop_all(self, error: EngineError) -> tuple[Event, ...]:
        """End every job with an error, whatever state the scheduler is in."""
        events = tuple(Event(name, error, True) for name in self._jobs)
        self._jobs.clear()
        self.scheduler.clear()
        return events

    def _tick(self, now_s: float, events: list[Event]) -> None:
        for job in tuple(self._jobs.values()):
            if job.deadline_s is not None and now_s >= job.deadline_s:
                events.append(self._fail(job, DeadlineExceededError("the deadline passed")))
                continue
            self._next(job, now_s, events)

    def _refuse(self, hopeless: Iterable[Sequence], events: list[Event]) -> None:
        for name in {sequence.id for sequence in hopeless} & self._jobs.keys():
            error = DeadlineExceededError("the deadline would pass before the answer")
            events.append(self._fail(self._jobs[name], error))

    def _next(self, job: Job[Any], now_s: float, events: list[Event]) -> None:
        try:
            output = job.next(self.scheduler, now_s)
        except Exception as error:  # noqa: BLE001 whatever it is, other jobs have no part in it
            events.append(self._failed(job, error))
        else:
            self._emit(job, output, events)

    def _parts(self, schedule: Schedule, events: list[Event]) -> list[Part]:
        """The step's chunks, and what their jobs want from each."""
        parts: list[Part] = []
        first = first_hidden = 0
        jobs = [self._jobs[chunk.sequence.id] for chunk in schedule.chunks]
        for chunk, job in zip(schedule.chunks, jobs, strict=True):
            end = first + chunk.num_logit_rows
            end_hidden = first_hidden + chunk.num_result_rows - chunk.num_logit_rows
            hidden = slice(first_hidden, end_hidden)
            parts.append(Part(chunk, job, first, end, hidden, self._want(job, chunk, events)))
            first, first_hidden = end, end_hidden
        return parts

    def _want(self, job: Job[Any], chunk: Chunk, events: list[Event]) -> Want:
        if job.id in self._jobs:  # a job may have several chunks, and fail at the first
            try:
                want = job.wants(chunk)
                vocab_size = want.vocab_size or self._vocab_size
                for row in want.samples:
                    check_row(row, vocab_size)
                if want.target_ids:
                    check_ids(want.target_ids, vocab_size)
                return want
            except Exception as error:  # noqa: BLE001 whatever it is, other jobs have no part in it
                events.append(self._failed(job, error))
        return Want()

    def _commit(self, schedule: Schedule, parts: Seq[Part], outcome: Outcome, events: list[Event]) -> None:
        """Advance every sequence of the step; a row with bad logits ends only its own job, a draft's none."""
        answers = answers_of(self._live(parts), outcome)
        for part, _ in answers:
            if part.job.id in self._jobs and not outcome.bad_rows.isdisjoint(part.own_rows):
                events.append(self._fail(part.job, NumericalError("the logits are not finite")))
        self.scheduler.commit(schedule)
        now_s = time.monotonic()
        for part, answer in answers:
            job = part.job
            if not part.has_rows or job.id not in self._jobs:
                continue
            try:
                output = job.take(part.chunk, answer, self.scheduler, now_s)
            except Exception as error:  # noqa: BLE001 whatever it is, other jobs have no part in it
                events.append(self._failed(job, error))
            else:
                self._emit(job, output, events)

    def _live(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Those whose job has not ended in the meantime; one job may have several."""
        return (part for part in parts if part.job.id in self._jobs)

    def _emit(self, job: Job[Any], output: object, events: list[Event]) -> None:
        if job.is_done:
            del self._jobs[job.id]
        if output is not None:
            events.append(Event(job.id, output, job.is_done))

    @contextmanager
    def _together(self, events: list[Event]) -> Iterator[None]:
        """An exception in this block ends all jobs."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 whatever it is, requests that come later have no part in it
            self._start_over(error, events)

    def _start_over(self, error: Exception, events: list[Event]) -> None:
        """End all jobs, so that later ones are not affected."""
        self._num_failed_steps += 1
        events += self.drop_all(_unexpected(error, *self._jobs))

    def _failed(self, job: Job[Any], error: Exception) -> Event:
        """End a job with the error that it raised."""
        return self._fail(job, error if isinstance(error, EngineError) else _unexpected(error, job.id))

    def _fail(self, job: Job[Any], error: EngineError) -> Event:
        if isinstance(error, NumericalError):
            self.scheduler.distrust(job.id)
        try:
            job.drop(self.scheduler)
        except Exception as failure:  # noqa: BLE001 whatever it is, other jobs have no part in it
            num_left = self.scheduler.drop(job.id)
            _log.error(
                "a request could not be ended properly and was dropped",
                job=job.id,
                sequences=num_left,
                reason=str(error),
                exc_info=failure,
            )
        del self._jobs[job.id]
        return Event(job.id, error, True)

    def _shed(self, schedule: Schedule, error: Exception, events: list[Event]) -> None:
        """End one job of a step that there was no memory for, the newest, which has the least to lose.

        The others' rows run again in the next step, to the same results.
        """
        sequences = [chunk.sequence for chunk in schedule.chunks if chunk.sequence.id in self._jobs]
        if sequences:
            newest = max(sequences, key=_newness)
            events.append(self._failed(self._jobs[newest.id], error))
        self.scheduler.undo(schedule)

    def _fail_step(self, schedule: Schedule, error: Exception, events: list[Event]) -> None:
        """End the jobs of a step that failed as a whole; the others continue."""
        self._num_failed_steps += 1
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            raise error
        sequences = (*(chunk.sequence for chunk in schedule.chunks), *schedule.started)
        names = {sequence.id for sequence in sequences}
        failure = _unexpected(error, *sorted(names))
        for name in sorted(names):
            job = self._jobs.get(name)
            if job is not None:
                events.append(self._fail(job, failure))
            else:
                self.scheduler.drop(name)  # what an ended job left behind
        for fill in schedule.prefix_fills:
            self.scheduler.forget(fill.virtual)  # it may not have got that far
        self.scheduler.commit(schedule)  # all its sequences are finished, and their blocks become free


def _newness(sequence: Sequence) -> tuple[bool, bool, float]:
    """The engine's own first; a scoring's continuations have waited longer than they say."""
    return sequence.is_internal, not sequence.is_continuation, sequence.arrival


def _stats(schedule: Schedule, duration_s: float) -> StepStats:
    num_decode = sum(chunk.is_decode for chunk in schedule.chunks)
    return StepStats(
        duration_s=duration_s,
        num_prefill_tokens=schedule.num_tokens - schedule.num_drafts - num_decode,
        num_decode_tokens=num_decode,
        num_draft_tokens=schedule.num_drafts,
        num_adapters=len({chunk.sequence.slot for chunk in schedule.chunks} - {0}),
        num_preempted=len(schedule.preempted),
        prefix_cache_queries=schedule.prefix_cache_queries,
        prefix_cache_hits=schedule.prefix_cache_hits,
    )


def _unexpected(error: Exception, *job_ids: str) -> EngineError:
    """What callers are told; the details are logged."""
    if is_out_of_memory(error):
        _log.error("there was no memory for a request", jobs=job_ids, exc_info=error)
        return NoMemoryError()
    failure = RequestFailedError(uuid.uuid4().hex)
    failure.__cause__ = error
    _log.error("a request failed in the engine", jobs=job_ids, error_id=failure.error_id, exc_info=error)
    return failure
