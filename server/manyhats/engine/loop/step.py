"""The engine's loop body: schedule → plan → forward → finish, then result → take. One thread owns it.

Where the backend runs ahead, a step is launched before the one before it is collected:

    turn k:  schedule(k) → plan, wants → forward → finish      launch
             result(k − 1) → commit, take                      collect, while k runs
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.primitives import KVPrefix
from manyhats.engine.backends.backend import AdapterSlots, KVCache, Model
from manyhats.engine.backends.wants import Outcome
from manyhats.engine.errors import (
    EngineDeadError,
    EngineError,
    NumericalError,
    RequestCancelledError,
    is_out_of_memory,
)
from manyhats.engine.loop.in_flight import StepInFlight
from manyhats.engine.loop.job import Event, Job
from manyhats.engine.loop.jobs import Jobs, unexpected
from manyhats.engine.loop.parts import answers_of, wants_of
from manyhats.engine.loop.plan import step_plan
from manyhats.engine.loop.watch import Allowance
from manyhats.engine.output import StepStats
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence

_MAX_FAILED_STEPS = 8
"""In a row: if no step succeeds any more, the engine is useless."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one turn reports to callers, and statistics.

    Attributes:
        events: for the callers.
        stats: of the step that was collected; None if none was.
        is_stuck: jobs are left but none made progress, which should not happen.
    """

    events: tuple[Event, ...]
    stats: StepStats | None
    is_stuck: bool = False


class Step:
    """Runs jobs to their end. Not thread-safe; ``Loop`` runs it on a thread.

    An exception from a job ends only that job; one from the step as a whole, such as the forward, ends the step's jobs,
    but if there was no memory for it, only the newest. What was launched on top of such a step is given up and runs
    again. One from the scheduler ends all jobs, since it may be in any state: it then starts over.

    Args:
        scheduler: decides each step.
        model: runs it.
        cache: the model's.
        adapters: the model's.
        vocab_size: the model's.
        runs_ahead: whether a step is launched before the one before it is collected (``Backend.runs_ahead``).

    Attributes:
        allowance: how long what runs may take.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: Model[Any, Any],
        cache: KVCache,
        adapters: AdapterSlots[Any],
        vocab_size: int,
        *,
        runs_ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self._model = model
        self._cache = cache
        self._adapters = adapters
        self._vocab_size = vocab_size
        self._runs_ahead = runs_ahead
        self._jobs = Jobs(scheduler, vocab_size)
        self._in_flight: deque[StepInFlight] = deque()  # the oldest first; one between turns, and two within
        self._collected_s = 0.0
        self._num_failed_steps = 0  # since the last one that succeeded
        self.allowance = Allowance()

    @property
    def is_in_flight(self) -> bool:
        """Whether a step is launched and not collected: it may use what jobs held that have ended since."""
        return bool(self._in_flight)

    @property
    def has_work(self) -> bool:
        """Whether any job is unfinished, or a step is in flight."""
        return len(self._jobs) > 0 or self.is_in_flight

    @property
    def is_idle(self) -> bool:
        """Whether nothing can run: there is no job, or each waits for its reader or for its task's limits."""
        is_waiting = self.scheduler.num_paused == len(self._jobs) or self.scheduler.is_held_back
        return is_waiting and not self.is_in_flight

    def add(self, job: Job[Any]) -> tuple[Event, ...]:
        """Accept a job; if it cannot, the event says why."""
        events: list[Event] = []
        with self._together(events):
            self._jobs.add(job, time.monotonic(), events)
        return tuple(events)

    def cancel(self, job_id: str) -> tuple[Event, ...]:
        """End a job at once; its blocks are free on return, or once no step in flight uses them.

        Unknown ids are ignored.
        """
        events: list[Event] = []
        job = self._jobs.get(job_id)
        if job is not None:
            with self._together(events):
                events.append(self._jobs.fail(job, RequestCancelledError("cancelled")))
        return tuple(events)

    def run(self) -> StepResult:
        """Take one turn: end what has reached a time limit, launch the next batch, if there is one, and collect.

        Raises:
            EngineDeadError: the device can run nothing any more.
            Exception: the step failed as a whole, as did several before it in a row.
        """
        events: list[Event] = []
        try:
            return self._turn(events)
        except EngineDeadError:
            raise
        except Exception as error:
            self._start_over(error, events)
            if self._num_failed_steps >= _MAX_FAILED_STEPS:
                raise
            return StepResult(tuple(events), None)

    def _turn(self, events: list[Event]) -> StepResult:
        began_s = time.monotonic()
        num_jobs, was_in_flight = len(self._jobs), self.is_in_flight
        stats = self._collect(events) if self.scheduler.must_land else None
        self._jobs.tick(began_s, events)
        schedule = self.scheduler.schedule()
        num_kept = 0
        if schedule.chunks and self._launch(schedule, began_s, events) and self._runs_ahead:
            num_kept = 1
        while len(self._in_flight) > num_kept:
            stats = self._collect(events)
        self._jobs.refuse(schedule.hopeless, events)  # not before: others of their jobs may be in the step
        is_over = not (schedule.chunks or was_in_flight or events) and len(self._jobs) == num_jobs
        return StepResult(tuple(events), stats, is_stuck=is_over and not self.is_idle)

    def _launch(self, schedule: Schedule, began_s: float, events: list[Event]) -> bool:
        """Start a step; returns whether it is in flight now."""
        before = self._in_flight[-1].choices if self._in_flight else {}
        self.allowance.begin(schedule.num_tokens + sum(step.schedule.num_tokens for step in self._in_flight))
        try:
            plan = step_plan(schedule, self._cache.block_size, before)  # while every sequence has its blocks
            parts = self._jobs.parts(schedule, events)
            self._fill_prefixes(schedule)
            logits = self._model.forward(plan, self._cache, self._adapters)
            pending = logits.finish(wants_of(parts, self._vocab_size))
            if self._runs_ahead:
                self.scheduler.count_on(schedule)
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001 whatever it is, requests beyond this step have no part in it
            if is_out_of_memory(error):
                self._shed(schedule, error, events)
            else:
                self._fail_step(schedule, error, events)
            return False
        self._in_flight.append(StepInFlight(schedule, parts, pending, began_s))
        return True

    def _collect(self, events: list[Event]) -> StepStats | None:
        """Wait for the oldest step in flight, and give its jobs what they want; None if it failed."""
        step = self._in_flight.popleft()
        is_computed = False
        try:
            outcome = step.pending.result()
            is_computed = True
            self._commit(step, outcome, events)
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001 whatever it is, requests beyond this step have no part in it
            self._give_up_later()
            if is_out_of_memory(error) and not is_computed:
                self._shed(step.schedule, error, events)
            else:
                self._fail_step(step.schedule, error, events)
            return None
        self._num_failed_steps = 0
        now_s = time.monotonic()
        elapsed_s = now_s - max(step.began_s, self._collected_s)
        self._collected_s = now_s
        self.allowance.end(elapsed_s, step.schedule.num_tokens)
        return step.stats(elapsed_s)

    def _fill_prefixes(self, schedule: Schedule) -> None:
        for fill in schedule.prefix_fills:
            if isinstance(source := fill.virtual.source, KVPrefix):
                keys, values = (part[:, fill.first_token :] for part in (source.keys, source.values))
                self._cache.write(fill.block_ids, keys, values)

    def _commit(self, step: StepInFlight, outcome: Outcome, events: list[Event]) -> None:
        """Advance every sequence of the step; a row with bad logits ends only its own job, a draft's none."""
        answers = [each for each in answers_of(step.parts, outcome) if self._jobs.awaits(each[0])]
        for part, _ in answers:
            if part.job.id in self._jobs and not outcome.bad_rows.isdisjoint(part.own_rows):
                events.append(self._jobs.fail(part.job, NumericalError("the logits are not finite")))
        self.scheduler.commit(step.schedule)
        now_s = time.monotonic()
        for part, answer in answers:
            if part.has_rows and part.job.id in self._jobs:
                self._jobs.take(part, answer, now_s, events)

    def drop_all(self, error: EngineError) -> tuple[Event, ...]:
        """End every job with an error, whatever state the scheduler is in."""
        events = self._jobs.forget_all(error)
        self.settle()
        self.scheduler.clear()
        return events

    def settle(self) -> None:
        """Wait until nothing runs any more; what it had to say is lost."""
        for step in self._in_flight:
            step.wait()
        self._in_flight.clear()

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
        events += self.drop_all(self._jobs.unexpected(error))

    def _give_up_later(self) -> None:
        """A step has failed on which later ones were launched: these run again."""
        while self._in_flight:
            later = self._in_flight.pop()
            later.wait()
            self.scheduler.undo(later.schedule)

    def _shed(self, schedule: Schedule, error: Exception, events: list[Event]) -> None:
        """End one job of a step that there was no memory for, the newest, which has the least to lose.

        The others' rows run again in the next step, to the same results.
        """
        sequences = [chunk.sequence for chunk in schedule.chunks if chunk.sequence.id in self._jobs]
        if sequences:
            newest = max(sequences, key=_newness)
            job = self._jobs.get(newest.id)
            if job is not None:
                events.append(self._jobs.failed(job, error))
        self.scheduler.undo(schedule)

    def _fail_step(self, schedule: Schedule, error: Exception, events: list[Event]) -> None:
        """End the jobs of a step that failed as a whole; the others continue."""
        self._num_failed_steps += 1
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            raise error
        sequences = (*(chunk.sequence for chunk in schedule.chunks), *schedule.started)
        names = sorted({sequence.id for sequence in sequences})
        self._jobs.fail_all(names, unexpected(error, *names), events)
        for fill in schedule.prefix_fills:
            self.scheduler.forget(fill.virtual)  # it may not have got that far
        self.scheduler.commit(schedule)  # all its sequences are finished, and their blocks become free


def _newness(sequence: Sequence) -> tuple[bool, bool, float]:
    """The engine's own first; a scoring's continuations have waited longer than they say."""
    return sequence.is_internal, not sequence.is_continuation, sequence.arrival
