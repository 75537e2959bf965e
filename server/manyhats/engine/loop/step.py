"""The engine's loop body: schedule → run → sample → commit. One thread owns it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor

from manyhats.adapters.primitives import KVPrefix
from manyhats.engine.backends.backend import AdapterSlots, Kernels, KVCache
from manyhats.engine.backends.batch import Batch
from manyhats.engine.backends.decoder import Decoder
from manyhats.engine.errors import (
    DeadlineExceededError,
    EngineError,
    NumericalError,
    RequestCancelledError,
    RequestFailedError,
)
from manyhats.engine.loop.build_batch import build_batch, num_logit_rows
from manyhats.engine.loop.jobs import Event, Job, Output, SampledToken
from manyhats.engine.output import StepStats
from manyhats.engine.sampling.sampler import SamplingRow, non_finite_rows, sample
from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.schedule import Chunk, Schedule, SchedulerConfig
from manyhats.engine.scheduling.scheduler import Scheduler

_MAX_FAILED_STEPS = 8
"""In a row; where no step gets through any more, the engine is of no use."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step tells the callers, and its statistics.

    Attributes:
        events: for the callers.
        stats: None where nothing ran.
        is_stuck: jobs are left and none got on, which should not be.
    """

    events: tuple[Event, ...]
    stats: StepStats | None
    is_stuck: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A chunk's share of the logits: rows [first, scored_end) are scored, then one is sampled if there is one."""

    chunk: Chunk
    job: Job
    first: int
    scored_end: int
    end: int

    @property
    def first_position(self) -> int:
        """The position in the sequence that row ``first`` belongs to."""
        return self.chunk.end - (self.end - self.first)


class Engine:
    """Runs jobs to their end. Not thread-safe; ``AsyncEngine`` gives it a thread.

    What a job raises ends that job alone; what a step raises as a whole, such as the forward, ends the step's jobs.
    What the scheduler raises ends all jobs, since it may have been left in any state: it then starts anew.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: AdapterSlots,
        kernels: Kernels[Any, Any],
        *,
        num_blocks: int,
        block_size: int,
        scheduler: SchedulerConfig,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._slots = slots
        self._kernels = kernels
        self._block_size = block_size
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.scheduler = Scheduler(scheduler, self.allocator)
        self._jobs: dict[str, Job] = {}
        self._num_failed_steps = 0  # since the last one that got through

    @property
    def has_work(self) -> bool:
        """Whether any job is unfinished."""
        return bool(self._jobs)

    @property
    def is_idle(self) -> bool:
        """Whether nothing can run by itself: there is no job, or each waits for its reader."""
        return self.scheduler.num_paused == len(self._jobs)

    def add(self, job: Job) -> tuple[Event, ...]:
        """Takes a job in; the event says why not, where it can't."""
        events: list[Event] = []
        with self._together(events):
            self._jobs[job.id] = job
            with self._alone(job, events):
                job.start(self.scheduler)
        return tuple(events)

    def cancel(self, job_id: str) -> tuple[Event, ...]:
        """Ends a job at once; its blocks are free when this returns. Unknown ids are ignored."""
        events: list[Event] = []
        job = self._jobs.get(job_id)
        if job is not None:
            with self._together(events):
                events.append(self._fail(job, RequestCancelledError("cancelled")))
        return tuple(events)

    def step(self) -> StepResult:
        """One turn: ends what the clock ends, then runs the next batch, if there is one.

        Raises:
            Exception: what a step failed with as a whole, after several in a row that did.
        """
        events: list[Event] = []
        try:
            return self._step(events)
        except Exception as error:
            self._start_over(error, events)
            if self._num_failed_steps >= _MAX_FAILED_STEPS:
                raise
            return StepResult(tuple(events), None)

    def _step(self, events: list[Event]) -> StepResult:
        started = time.monotonic()
        num_jobs = len(self._jobs)
        self._tick(started, events)
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            is_stuck = not events and len(self._jobs) == num_jobs and not self.is_idle
            return StepResult(tuple(events), None, is_stuck)
        try:
            batch = build_batch(schedule, self._block_size)
            self._fill_prefixes(schedule)
            with torch.inference_mode():
                logits = self._decoder.forward(batch, self._cache, self._slots)
                self._commit(schedule, logits, started, events)
        except Exception as error:  # noqa: BLE001 whatever it is, requests beyond this step have no part in it
            self._fail_step(schedule, error, events)
            return StepResult(tuple(events), None)
        self._num_failed_steps = 0
        return StepResult(tuple(events), self._stats(schedule, batch, time.monotonic() - started))

    def _fill_prefixes(self, schedule: Schedule) -> None:
        for fill in schedule.prefix_fills:
            if isinstance(source := fill.virtual.source, KVPrefix):
                keys, values = (part[:, fill.first_token :] for part in (source.keys, source.values))
                self._cache.write(fill.block_ids, keys, values)

    def drop_all(self, error: EngineError) -> tuple[Event, ...]:
        """Ends every job with an error, whatever state the scheduler is in."""
        events = tuple(Event(name, error, True) for name in self._jobs)
        self._jobs.clear()
        self.scheduler.clear()
        return events

    def _tick(self, now_s: float, events: list[Event]) -> None:
        for job in tuple(self._jobs.values()):
            if job.deadline_s is not None and now_s >= job.deadline_s:
                events.append(self._fail(job, DeadlineExceededError("the deadline passed")))
                continue
            with self._alone(job, events):
                self._emit(job, job.tick(self.scheduler, now_s), events)

    def _commit(self, schedule: Schedule, logits: Tensor, started: float, events: list[Event]) -> None:
        """Samples, scores, and moves every sequence of the step on; a row with bad logits ends its job alone."""
        rows = self._rows(schedule)
        bad = set(non_finite_rows(logits))
        for part in self._live(rows):
            if bad.intersection(range(part.first, part.end)):
                events.append(self._fail(part.job, NumericalError("the logits are not finite")))
        for part in self._live(rows):
            with self._alone(part.job, events):
                part.job.begin(part.chunk.sequence, started)
                if part.scored_end > part.first:
                    scored = logits[part.first : part.scored_end]
                    part.job.score(part.chunk.sequence, part.first_position, scored, self._kernels)
        rows = list(self._live(rows))
        tokens = self._sample(rows, logits, events)
        ended = [part.chunk.ends_tokens for part in rows]
        self.scheduler.commit(schedule)
        now_s = time.monotonic()
        for part, token, is_end in zip(rows, tokens, ended, strict=True):
            if is_end and part.job.id in self._jobs:
                with self._alone(part.job, events):
                    output = part.job.commit(part.chunk.sequence, token, self.scheduler, now_s)
                    self._emit(part.job, output, events)

    def _live(self, rows: Iterable[_Rows]) -> Iterator[_Rows]:
        """Those whose job has not ended meanwhile; one job may have several."""
        return (part for part in rows if part.job.id in self._jobs)

    def _rows(self, schedule: Schedule) -> list[_Rows]:
        rows: list[_Rows] = []
        first = 0
        for chunk in schedule.chunks:
            end = first + num_logit_rows(chunk)
            job = self._jobs[chunk.sequence.id]
            sampled = chunk.ends_tokens and job.samples
            rows.append(_Rows(chunk, job, first, end - 1 if sampled else end, end))
            first = end
        return rows

    def _sample(self, rows: Seq[_Rows], logits: Tensor, events: list[Event]) -> list[SampledToken | None]:
        """One token for each of the rows that samples, in their order; None for the others and those that fail."""
        sampling: list[_Rows] = []
        sampling_rows: list[SamplingRow] = []
        for part in rows:
            if part.scored_end < part.end:
                with self._alone(part.job, events):
                    sampling_rows.append(part.job.sampling_row(part.chunk.sequence))
                    sampling.append(part)
        if not sampling:
            return [None] * len(rows)
        index = [part.end - 1 for part in sampling]
        chosen = logits if len(index) == logits.shape[0] else logits[index]
        result = sample(chosen, sampling_rows, self._kernels)
        tokens: dict[int, SampledToken] = {}
        for number, part in enumerate(sampling):
            with self._alone(part.job, events):
                if number in result.failures:
                    raise result.failures[number]
                tokens[part.first] = SampledToken(result.token_ids[number], result.logprobs[number])
        return [tokens.get(part.first) for part in rows]

    def _emit(self, job: Job, output: Output | None, events: list[Event]) -> None:
        if job.is_done:
            del self._jobs[job.id]
        if output is not None:
            events.append(Event(job.id, output, job.is_done))

    @contextmanager
    def _alone(self, job: Job, events: list[Event]) -> Iterator[None]:
        """What is raised in this block ends the job, and nothing else."""
        try:
            yield
        except EngineError as error:
            events.append(self._fail(job, error))
        except Exception as error:  # noqa: BLE001 whatever it is, other jobs have no part in it
            events.append(self._fail(job, _unexpected(error, job.id)))

    @contextmanager
    def _together(self, events: list[Event]) -> Iterator[None]:
        """What is raised in this block ends all jobs."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 whatever it is, requests that come later have no part in it
            self._start_over(error, events)

    def _start_over(self, error: Exception, events: list[Event]) -> None:
        """Ends all jobs, so that those that come later have no part in it."""
        self._num_failed_steps += 1
        events += self.drop_all(_unexpected(error, *self._jobs))

    def _fail(self, job: Job, error: EngineError) -> Event:
        try:
            job.abort(self.scheduler)
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

    def _fail_step(self, schedule: Schedule, error: Exception, events: list[Event]) -> None:
        """Ends the jobs of a step that failed as a whole; the others go on."""
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
                self.scheduler.drop(name)  # what a job left behind that has ended
        for fill in schedule.prefix_fills:
            self.scheduler.forget(fill.virtual)  # it may not have come to that
        self.scheduler.commit(schedule)  # all of its sequences are finished: their blocks come free

    def _stats(self, schedule: Schedule, batch: Batch, duration_s: float) -> StepStats:
        num_decode = sum(chunk.is_decode for chunk in schedule.chunks)
        return StepStats(
            duration_s=duration_s,
            num_prefill_tokens=batch.num_tokens - num_decode,
            num_decode_tokens=num_decode,
            num_adapters=batch.adapter_rows.num_adapters,
            num_preempted=len(schedule.preempted),
            prefix_cache_queries=schedule.prefix_cache_queries,
            prefix_cache_hits=schedule.prefix_cache_hits,
        )


def _unexpected(error: Exception, *job_ids: str) -> RequestFailedError:
    """What the callers hear of it; the log has it whole."""
    failure = RequestFailedError(uuid.uuid4().hex)
    failure.__cause__ = error
    _log.error("a request failed in the engine", jobs=job_ids, error_id=failure.error_id, exc_info=error)
    return failure
