"""Adapters for requests: pinned at once where they are loaded, else loaded on other threads, and queued for a slot."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.errors import AdapterCapacityError, DrainingError
from manyhats.engine.residency.residency import AdapterResidency, Claim, ResidentAdapter
from manyhats.engine.threads.background import Background

_NUM_THREADS = 2


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who waits for a slot."""

    record: AdapterRecord
    lowered: LoweredAdapter | None
    claimed: asyncio.Future[Claim] = field(default_factory=asyncio.Future)


class AdapterLoading:
    """``AdapterResidency`` for an event loop, on which all of this is called unless it says otherwise.

    While every slot has an adapter that is in use, those who ask for others wait, first come first served; all who
    wait for the same adapter get it together. No thread waits with them.
    """

    def __init__(self, residency: AdapterResidency, background: Background) -> None:
        self.residency = residency
        self._threads = background.threads(_NUM_THREADS, "adapter-loader")
        self._queue: OrderedDict[str, dict[_Waiter, None]] = (
            OrderedDict()
        )  # by digest, the first to ask first
        self._tasks: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        residency.call_on_room(self._room)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot or a load; from any thread."""
        return self._names.total()

    @property
    def waiting_tasks(self) -> tuple[str, ...]:
        """Their task ids; from any thread."""
        return tuple(sorted(self._tasks))

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request for this version waits; from any thread."""
        return self._names[record.name] > 0

    async def acquire(self, record: AdapterRecord) -> ResidentAdapter:
        """Pins an adapter for a request; cancel it to leave.

        Raises:
            AdapterError: it cannot be loaded.
            DrainingError: there will be no more loads.
        """
        with self._counted(record):
            return await self._acquire(record, None, None)

    async def warm(
        self, record: AdapterRecord, lowered: LoweredAdapter | None = None, *, max_wait_s: float
    ) -> None:
        """Loads an adapter ahead of its requests.

        Args:
            record: the version.
            lowered: what it comes to, where that is at hand; None reads it.
            max_wait_s: how long to wait for a slot.

        Raises:
            AdapterError: it cannot be loaded.
            AdapterCapacityError: every slot is in use.
            DrainingError: there will be no more loads.
        """
        await self._acquire(record, lowered, max_wait_s)
        self.residency.release(record)

    def close(self) -> None:
        """Starts no more loads, and ends every wait; what has begun goes on by itself."""
        self._is_closed = True
        for waiters in self._queue.values():
            for waiter in waiters:
                if not waiter.claimed.done():
                    waiter.claimed.set_exception(_closed())
        self._queue.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def _counted(self, record: AdapterRecord) -> Iterator[None]:
        counters = ((self._tasks, record.task_id), (self._names, record.name))
        for counter, key in counters:
            counter[key] += 1
        try:
            yield
        finally:
            for counter, key in counters:
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    async def _acquire(
        self, record: AdapterRecord, lowered: LoweredAdapter | None, max_wait_s: float | None
    ) -> ResidentAdapter:
        claim = self._claim(record, lowered) or await self._queued(_Waiter(record, lowered), max_wait_s)
        try:
            return await asyncio.shield(asyncio.wrap_future(claim.loaded))
        except asyncio.CancelledError:
            self._release_unused(record, claim)
            raise

    async def _queued(self, waiter: _Waiter, max_wait_s: float | None) -> Claim:
        """A slot, when this one's turn has come."""
        self._loop = asyncio.get_running_loop()
        self._queue.setdefault(waiter.record.digest, {})[waiter] = None
        self._serve()  # a slot may have come free on another thread just before
        try:
            async with asyncio.timeout(max_wait_s):
                return await waiter.claimed
        except TimeoutError:
            self._leave(waiter)
            raise AdapterCapacityError(self.residency.num_slots, max_wait_s or 0.0) from None
        except asyncio.CancelledError:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Takes out who still waits; gives a claim back that came too late."""
        digest = waiter.record.digest
        waiters = self._queue.get(digest, {})
        if waiter in waiters:
            del waiters[waiter]
            if not waiters:
                del self._queue[digest]
        elif waiter.claimed.done() and not waiter.claimed.cancelled() and waiter.claimed.exception() is None:
            self._release_unused(waiter.record, waiter.claimed.result())

    def _claim(
        self, record: AdapterRecord, lowered: LoweredAdapter | None, *, is_first: bool = False
    ) -> Claim | None:
        """A pin, and its load begun; None where there is no slot, or others wait for one."""
        if self._is_closed:
            raise _closed()
        claim = self.residency.claim(record, may_take_slot=is_first or not self._queue)
        if claim is not None and claim.must_fill:
            filling = self._threads.submit(self.residency.fill, record, lowered)
            filling.add_done_callback(lambda done: self._give_up_cancelled(record, done))
        return claim

    def _room(self) -> None:
        """On any thread: a slot may have come free."""
        if self._queue and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._serve)

    def _serve(self) -> None:
        """Hands slots to those who have waited longest."""
        while self._queue:
            digest, waiters = next(iter(self._queue.items()))
            while waiters:
                waiter = next(iter(waiters))
                if not waiter.claimed.done():
                    claim = self._claim(waiter.record, waiter.lowered, is_first=True)
                    if claim is None:
                        return
                    waiter.claimed.set_result(claim)
                del waiters[waiter]
            del self._queue[digest]

    def _give_up_cancelled(self, record: AdapterRecord, filling: Future[None]) -> None:
        if filling.cancelled():
            self.residency.give_up(record, _closed())

    def _release_unused(self, record: AdapterRecord, claim: Claim) -> None:
        """Unpins it once it is loaded; one that cannot be loaded has no pins."""

        def release(loaded: Future[ResidentAdapter]) -> None:
            if loaded.exception() is None:
                self.residency.release(record)

        claim.loaded.add_done_callback(release)


def _closed() -> DrainingError:
    return DrainingError("the server is shutting down")
