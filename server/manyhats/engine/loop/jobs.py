"""The engine's jobs: asked before each step, given its results, and ended by an error alone where one concerns them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import structlog

from manyhats.engine.backends.wants import check_ids
from manyhats.engine.errors import (
    DeadlineExceededError,
    EngineError,
    NoMemoryError,
    NumericalError,
    RequestFailedError,
    is_out_of_memory,
)
from manyhats.engine.loop.job import Answer, Event, Job, Want
from manyhats.engine.loop.parts import Part
from manyhats.engine.sampling.sampler import check_row
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus

_log = structlog.get_logger(__name__)


class Jobs:
    """Those that have not ended, by id. What they say is appended to the ``events`` of each call.

    Args:
        scheduler: has their sequences.
        vocab_size: the model's.
    """

    def __init__(self, scheduler: Scheduler, vocab_size: int) -> None:
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._jobs: dict[str, Job[Any]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def get(self, job_id: str) -> Job[Any] | None:
        """One by its id; None if it has ended."""
        return self._jobs.get(job_id)

    def add(self, job: Job[Any], now_s: float, events: list[Event]) -> None:
        """Accept a job; if it cannot be, the event says why."""
        self._jobs[job.id] = job
        self._next(job, now_s, events)

    def tick(self, now_s: float, events: list[Event]) -> None:
        """Before a step: end those at their deadlines, and ask the others what is next."""
        for job in tuple(self._jobs.values()):
            if job.deadline_s is not None and now_s >= job.deadline_s:
                events.append(self.fail(job, DeadlineExceededError("the deadline passed")))
                continue
            self._next(job, now_s, events)

    def _next(self, job: Job[Any], now_s: float, events: list[Event]) -> None:
        try:
            output = job.next(self._scheduler, now_s)
        except Exception as error:  # noqa: BLE001 whatever it is, other jobs have no part in it
            events.append(self.failed(job, error))
        else:
            self._emit(job, output, events)

    def parts(self, schedule: Schedule, events: list[Event]) -> list[Part]:
        """A step's chunks, and what their jobs want from each; without those of jobs that fail at it."""
        parts: list[Part] = []
        first = first_hidden = 0
        jobs = [self._jobs[chunk.sequence.id] for chunk in schedule.chunks]
        for chunk, job in zip(schedule.chunks, jobs, strict=True):
            end = first + chunk.num_logit_rows
            end_hidden = first_hidden + chunk.num_result_rows - chunk.num_logit_rows
            hidden = slice(first_hidden, end_hidden)
            parts.append(Part(chunk, job, first, end, hidden, self._want(job, chunk, events)))
            first, first_hidden = end, end_hidden
        return [part for part in parts if part.job.id in self._jobs]

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
                events.append(self.failed(job, error))
        return Want()

    def awaits(self, part: Part) -> bool:
        """Whether a part's result is still wanted: its job goes on, and its sequence has not stopped meanwhile."""
        return part.job.id in self._jobs and part.chunk.sequence.status is SequenceStatus.RUNNING

    def take(self, part: Part, answer: Answer, now_s: float, events: list[Event]) -> None:
        """Give a job its share of a step that is committed."""
        job = part.job
        try:
            output = job.take(part.chunk, answer, self._scheduler, now_s)
        except Exception as error:  # noqa: BLE001 whatever it is, other jobs have no part in it
            events.append(self.failed(job, error))
        else:
            self._emit(job, output, events)

    def refuse(self, hopeless: Iterable[Sequence], events: list[Event]) -> None:
        """End the jobs of sequences that cannot meet their deadlines."""
        for name in {sequence.id for sequence in hopeless} & self._jobs.keys():
            error = DeadlineExceededError("the deadline would pass before the answer")
            events.append(self.fail(self._jobs[name], error))

    def _emit(self, job: Job[Any], output: object, events: list[Event]) -> None:
        if job.is_done:
            del self._jobs[job.id]
        if output is not None:
            events.append(Event(job.id, output, job.is_done))

    def failed(self, job: Job[Any], error: Exception) -> Event:
        """End a job with the error that it raised."""
        return self.fail(job, error if isinstance(error, EngineError) else unexpected(error, job.id))

    def fail(self, job: Job[Any], error: EngineError) -> Event:
        """End a job with an error for its caller."""
        if isinstance(error, NumericalError):
            self._scheduler.distrust(job.id)
        try:
            job.drop(self._scheduler)
        except Exception as failure:  # noqa: BLE001 whatever it is, other jobs have no part in it
            num_left = self._scheduler.drop(job.id)
            _log.error(
                "a request could not be ended properly and was dropped",
                job=job.id,
                sequences=num_left,
                reason=str(error),
                exc_info=failure,
            )
        del self._jobs[job.id]
        return Event(job.id, error, True)

    def fail_all(self, names: Iterable[str], error: EngineError, events: list[Event]) -> None:
        """End some with one error; of a job that has ended already, drop what it left behind."""
        for name in names:
            job = self._jobs.get(name)
            if job is not None:
                events.append(self.fail(job, error))
            else:
                self._scheduler.drop(name)

    def forget_all(self, error: EngineError) -> tuple[Event, ...]:
        """End all of them, whatever state the scheduler is in, which is not asked."""
        events = tuple(Event(name, error, True) for name in self._jobs)
        self._jobs.clear()
        return events

    def unexpected(self, error: Exception) -> EngineError:
        """What all callers are told of an exception; it is logged."""
        return unexpected(error, *self._jobs)


def unexpected(error: Exception, *job_ids: str) -> EngineError:
    """What callers are told of an exception; the details are logged."""
    if is_out_of_memory(error):
        _log.error("there was no memory for a request", jobs=job_ids, exc_info=error)
        return NoMemoryError()
    failure = RequestFailedError(uuid.uuid4().hex)
    failure.__cause__ = error
    _log.error("a request failed in the engine", jobs=job_ids, error_id=failure.error_id, exc_info=error)
    return failure
