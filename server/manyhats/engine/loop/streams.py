"""Where the events of jobs go: in on the engine's thread, out on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterRecord
from manyhats.engine.errors import EngineDeadError
from manyhats.engine.loop.jobs import Event


@dataclass(slots=True, eq=False)
class Stream:
    """The events of one job; ``pinned`` is the version to release when the engine is through with it."""

    events: asyncio.Queue[Event]
    pinned: AdapterRecord | None
    is_ended: bool = False


class Streams:
    """The streams of all jobs in the engine.

    Args:
        release: unpins an adapter; called on either side.
    """

    def __init__(self, release: Callable[[AdapterRecord], None]) -> None:
        self._release = release
        self._streams: dict[str, Stream] = {}
        self._num_expected = 0
        self._idle = asyncio.Event()  # set when the last stream has gone
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_attached(self) -> bool:
        """Whether an event loop takes the events."""
        return self._loop is not None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Names the event loop that streams are opened and read on."""
        self._loop = loop

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """A stream that may be opened in this block is waited for, too."""
        self._num_expected += 1
        try:
            yield
        finally:
            self._num_expected -= 1
            self._note_idle()

    def open(self, job_id: str, pinned: AdapterRecord | None) -> Stream:
        """A stream for a job that is about to go to the engine."""
        stream = self._streams[job_id] = Stream(asyncio.Queue(), pinned)
        return stream

    async def wait_empty(self, timeout_s: float) -> None:
        """Waits until every stream has ended, those that are expected too, but not longer than this."""
        if self._streams or self._num_expected:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    # On the engine's thread

    def publish(self, events: list[Event]) -> bool:
        """Hands a step's events over in one call; says whether the loop is still there to take them."""
        for event in events:
            if event.is_last:
                self._unpin(self._streams[event.job_id])
        return not events or self._call(self._deliver, events)

    def end(self, reason: str) -> None:
        """Tells the streams that are left that nothing more will come."""
        self._call(self._end_rest, reason)

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
        """Here, since a stream that joins as the thread ends is known on this side alone; later ones are refused."""
        left = [job_id for job_id, stream in self._streams.items() if not stream.is_ended]
        for job_id in left:
            self._unpin(self._streams[job_id])
        self._deliver([Event(job_id, EngineDeadError(reason), True) for job_id in left])

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams[event.job_id]
            if event.is_last:
                del self._streams[event.job_id]
            stream.events.put_nowait(event)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams and not self._num_expected:
            self._idle.set()

    def _unpin(self, stream: Stream) -> None:
        """The engine is through with a stream's adapter."""
        stream.is_ended = True
        if stream.pinned is not None:
            self._release(stream.pinned)
