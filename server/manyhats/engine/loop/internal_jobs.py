"""Jobs of the engine's own: a worker thread hands one to the engine's thread and waits for what it makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from torch import Tensor

from manyhats.engine.backends.backend import Kernels
from manyhats.engine.errors import EngineDeadError, EngineError
from manyhats.engine.loop.jobs import Event, Job, Output, SampledToken
from manyhats.engine.loop.step import Engine
from manyhats.engine.sampling.sampler import SamplingRow
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.threads.background import Background

T = TypeVar("T")

_ID_PREFIX = "internal-"
Command = Callable[[], tuple[Event, ...]]
"""Something for the engine's thread to do between steps."""


class InternalJob(Generic[T]):
    """What these kinds of ``Job`` share: one result for one thread; no caller, no clock, no sampling."""

    def __init__(self, job_id: str, on_done: Callable[[T], None]) -> None:
        self.id = job_id
        self.deadline_s: float | None = None
        self.is_done = False
        self.samples = False
        self._on_done = on_done

    def tick(self, scheduler: Scheduler, now_s: float) -> Output | None:
        """Nothing to do between steps."""
        return None

    def begin(self, sequence: Sequence, now_s: float) -> None:
        """Nothing to note."""

    def sampling_row(self, sequence: Sequence) -> SamplingRow:
        """Never asked for."""
        raise TypeError("this job samples nothing")

    def score(
        self, sequence: Sequence, first_position: int, logits: Tensor, kernels: Kernels[Any, Any]
    ) -> None:
        """Its logits are of no use."""

    def commit(
        self, sequence: Sequence, sampled: SampledToken | None, scheduler: Scheduler, now_s: float
    ) -> Output | None:
        """It has no sequence."""
        return None

    def _finish(self, result: T) -> None:
        self.is_done = True
        self._on_done(result)


class InternalJobs:
    """The jobs that threads wait for.

    Args:
        engine: runs them; touched by commands alone.
        submit: hands a command to the engine's thread.
        background: whose threads wait.
    """

    def __init__(self, engine: Engine, submit: Callable[[Command], None], background: Background) -> None:
        self._engine = engine
        self._background = background
        self._submit = submit
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Future[Any]] = {}
        self._is_closed = False

    def run(self, make_job: Callable[[str, Callable[[T], None]], Job]) -> T:
        """Hands over a job, made from its id and what takes its result, and waits for the result.

        Raises:
            EngineError: what ended it.
        """
        return self._background.wait_for(self._start(make_job))

    def _start(self, make_job: Callable[[str, Callable[[T], None]], Job]) -> Future[T]:
        job_id = f"{_ID_PREFIX}{next(self._numbers)}"
        future: Future[T] = Future()
        job = make_job(job_id, future.set_result)
        self._waiting[job_id] = future
        if self._is_closed:  # asked after the entry is there, so that ``close`` misses none
            del self._waiting[job_id]
            raise EngineDeadError("the engine has ended")
        future.add_done_callback(lambda _: self._waiting.pop(job_id))
        self._submit(lambda: self._engine.add(job))
        return future

    def then(self, act: Callable[[Scheduler], None]) -> None:
        """Has the engine's thread do something before its next step; from any thread."""

        def command() -> tuple[Event, ...]:
            act(self._engine.scheduler)
            return ()

        self._submit(command)

    def take(self, event: Event) -> bool:
        """Whether an event is about one of these jobs; an error then ends the wait for it."""
        future = self._waiting.get(event.job_id)
        if future is not None and isinstance(event.payload, EngineError):
            future.set_exception(event.payload)
        return event.job_id.startswith(
            _ID_PREFIX
        )  # one that had its result, and then failed, is nobody else's

    def close(self) -> None:
        """Ends every wait; the engine's thread calls it as its last act."""
        self._is_closed = True
        for future in tuple(self._waiting.values()):
            future.set_exception(EngineDeadError("the engine has ended"))
