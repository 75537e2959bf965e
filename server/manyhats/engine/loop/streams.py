"""Where jobs' events go: in on the engine's thread, out on the event loop or to a waiting thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from manyhats.engine.errors import EngineDeadError, EngineError
from manyhats.engine.loop.job import Event


@dataclass(slots=True, eq=False)
class Stream:
    """The events of one job, for one reader.

    Attributes:
        job_id: the job.
        release: called, on either side, when the engine is done with it.
        is_ended: whether the engine is done with it.
        is_over: whether its last event has been taken.
    """

    job_id: str
    release: Callable[[], None]
    is_ended: bool = False
    is_over: bool = False
    _events: deque[Event] = field(default_factory=deque)
    _waiting: asyncio.Future[None] | None = None

    def end(self) -> None:
        """Note that the engine is done with its job."""
        self.is_ended = True
        self.release()

    def put(self, event: Event) -> None:
        """Add an event, and wake the reader; on the event loop."""
        self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self, limit: int | None = None) -> list[Any]:
        """The outputs that have come, at least one, and at most ``limit``; waits for the first.

        Raises:
            EngineError: the job ended with it; after all outputs.
        """
        events = self._events
        if not events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        outputs: list[Any] = []
        while events and (limit is None or len(outputs) < limit):
            is_error = isinstance(events[0].payload, EngineError)
            if is_error and outputs:
                break
            event = events.popleft()
            self.is_over = event.is_last
            if is_error:
                raise event.payload
            outputs.append(event.payload)
        return outputs


class Streams:
    """The streams of all jobs in the engine, and the threads that each wait for one output."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}
        self._expected: dict[str, Future[Any]] = {}
        self._has_ended = False
        self._num_expected = 0
        self._put_off: list[Callable[[], None]] = []
        self._idle = asyncio.Event()  # set when the last stream is gone
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_attached(self) -> bool:
        """Whether an event loop receives the events."""
        return self._loop is not None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop on which streams are opened and read."""
        self._loop = loop

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """``drained`` also waits for a stream that may be opened in this block."""
        self._num_expected += 1
        try:
            yield
        finally:
            self._num_expected -= 1
            self._note_idle()

    def open(self, job_id: str, release: Callable[[], None]) -> Stream:
        """Open a stream for a job that is about to go to the engine."""
        stream = self._streams[job_id] = Stream(job_id, release)
        return stream

    def expect(self, job_id: str) -> Future[Any]:
        """A future of the only output of a job about to go to the engine; callable from any thread.

        Raises:
            EngineDeadError: the engine has ended.
        """
        output = self._expected[job_id] = Future()
        if self._has_ended:  # checked after adding the entry, so that ``end`` misses none
            del self._expected[job_id]
            raise EngineDeadError("the engine has ended")
        return output

    async def wait_empty(self, timeout_s: float) -> None:
        """Wait until every stream has ended, including expected ones, but no longer than this."""
        if self._streams or self._num_expected:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    # On the engine's thread

    def publish(self, events: list[Event], *, is_in_flight: bool = False) -> bool:
        """Deliver a step's events in one call; returns whether the loop still exists to receive them.

        Args:
            events: of all jobs.
            is_in_flight: whether a step that was launched may still use what jobs hold that have ended. It is released
                with the next call, by which that step must be over; threads, which have slots of their own, get their
                answers then.
        """
        streamed = [event for event in events if event.job_id not in self._expected]
        due, self._put_off = self._put_off, self._endings(events)
        if not is_in_flight:
            due += self._put_off
            self._put_off = []
        for ending in due:
            ending()
        return not streamed or self._call(self._deliver, streamed)

    def _endings(self, events: list[Event]) -> list[Callable[[], None]]:
        """What is to be done once nothing runs any more of the jobs that these events end."""
        endings: list[Callable[[], None]] = []
        for event in events:
            if event.job_id in self._expected:
                endings.append(partial(self._answer, event))
            elif event.is_last:
                stream = self._streams[event.job_id]
                stream.is_ended = True
                endings.append(stream.release)
        return endings

    def end(self, reason: str) -> None:
        """Tell everyone still waiting that nothing more will come."""
        for ending in self._put_off:
            ending()
        self._put_off = []
        self._has_ended = True
        for job_id in tuple(self._expected):
            self._answer(Event(job_id, EngineDeadError(reason), True))
        self._call(self._end_rest, reason)

    def _answer(self, event: Event) -> None:
        """Tell the thread that waits for an event."""
        output = self._expected.pop(event.job_id)
        if isinstance(event.payload, EngineError):
            output.set_exception(event.payload)
        else:
            output.set_result(event.payload)

    def _call(self, callback: Callable[..., None], *arguments: object) -> bool:
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # On the event loop

    def _end_rest(self, reason: str) -> None:
        """End the rest on this side, where a stream that opens as the thread ends is known; later ones are refused."""
        left = [job_id for job_id, stream in self._streams.items() if not stream.is_ended]
        for job_id in left:
            self._streams[job_id].end()
        self._deliver([Event(job_id, EngineDeadError(reason), True) for job_id in left])

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams[event.job_id]
            if event.is_last:
                del self._streams[event.job_id]
            stream.put(event)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams and not self._num_expected:
            self._idle.set()
