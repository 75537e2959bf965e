"""Adapters for requests: leased at once if loaded, else loaded on other threads, in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.errors import AdapterCapacityError, DrainingError
from manyhats.engine.residency.lease import Lease
from manyhats.engine.residency.residency import MAX_LOADS, AdapterResidency
from manyhats.engine.threads.awaiting import outlived
from manyhats.engine.threads.background import background_threads

MAX_FETCHES = 8
"""Adapters that are brought nearer at a time: more than are loaded, since they wait for a network."""

FetchAdapter = Callable[[AdapterRecord], None]
"""Brings an artifact from afar to where it can be loaded quickly; returns at once if it is there."""


@dataclass(slots=True, eq=False)
class _Fetch:
    """An artifact on its way, and how many wait for it."""

    done: Future[None]
    num_waiting: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody waiting for room to load an adapter."""

    record: AdapterRecord
    lowered: LoweredAdapter | None
    priority: int = 0
    leased: asyncio.Future[Lease] = field(default_factory=asyncio.Future)


class AdapterLoading:
    """``AdapterResidency`` for an event loop, on which everything here is called unless stated otherwise.

    While others are being loaded, or memory is full of adapters in use, requests for one that is not in memory wait, by
    priority and then by arrival; all that wait for the same adapter get it together. No thread waits with them. What is
    far is fetched before it queues to be loaded, so that nobody whose adapter is near waits for a network.

    Args:
        residency: the adapters in memory.
        fetch: called on threads that do not load; None if all artifacts are near.
    """

    def __init__(self, residency: AdapterResidency, fetch: FetchAdapter | None = None) -> None:
        self.residency = residency
        self._fetch = fetch
        self._fetchers = background_threads(MAX_FETCHES, "adapter-fetcher")
        self._fetches: dict[str, _Fetch] = {}
        self._threads = background_threads(MAX_LOADS, "adapter-loader")
        self._queue: dict[str, dict[_Waiter, None]] = {}  # by digest, in order of arrival
        self._names: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        residency.call_on_room(self._room)

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait for their adapter to be loaded; callable from any thread."""
        return self._names.total()

    @property
    def waiting(self) -> frozenset[str]:
        """The names of their versions; callable from any thread."""
        return frozenset(self._names)

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request for this version is waiting; callable from any thread."""
        return self._names[record.name] > 0

    async def lease(self, record: AdapterRecord, priority: int = 0) -> Lease:
        """Lease an adapter for a request; cancel the call to stop waiting.

        Args:
            record: the version.
            priority: the request's.

        Raises:
            AdapterError: it cannot be loaded.
            DrainingError: no more adapters are loaded.
        """
        with self._counted(record):
            return await self._lease(record, None, None, priority)

    async def warm(
        self, record: AdapterRecord, lowered: LoweredAdapter | None = None, *, max_wait_s: float
    ) -> None:
        """Load an adapter before it is requested.

        Args:
            record: the version.
            lowered: the lowered adapter if already known; None reads it from the store.
            max_wait_s: how long to wait for room to load it.

        Raises:
            AdapterError: it cannot be loaded.
            AdapterCapacityError: there was no room in that time.
            DrainingError: no more adapters are loaded.
        """
        (await self._lease(record, lowered, max_wait_s)).release()

    async def pin(self, record: AdapterRecord, *, max_wait_s: float) -> None:
        """Load an adapter, and keep it in memory until ``AdapterResidency.unpin``.

        Raises:
            PinLimitError: the pinned adapters would not fit in memory.
            AdapterError, AdapterCapacityError, DrainingError: as ``warm``.
        """
        lease = await self._lease(record, None, max_wait_s)
        try:
            self.residency.pin(record.digest)
        finally:
            lease.release()

    def close(self) -> None:
        """Start no more loads, and end every wait; loads in progress continue."""
        self._is_closed = True
        for waiters in self._queue.values():
            for waiter in waiters:
                if not waiter.leased.done():
                    waiter.leased.set_exception(_closed())
        self._queue.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def _counted(self, record: AdapterRecord) -> Iterator[None]:
        self._names[record.name] += 1
        try:
            yield
        finally:
            self._names[record.name] -= 1
            if not self._names[record.name]:
                del self._names[record.name]

    async def _lease(
        self,
        record: AdapterRecord,
        lowered: LoweredAdapter | None,
        max_wait_s: float | None,
        priority: int = 0,
    ) -> Lease:
        lease = self.residency.lease(record, None)
        if lease is None:
            if lowered is None:
                await self._fetched(record)
            lease = self._begun(record, lowered)
        if lease is None:
            lease = await self._queued(_Waiter(record, lowered, priority), max_wait_s)
        try:
            await outlived(asyncio.wrap_future(lease.adapter.loaded))
        except asyncio.CancelledError:
            _release_unused(lease)
            raise
        return lease

    async def _fetched(self, record: AdapterRecord) -> None:
        """Wait until an artifact is near, or cannot be brought there: then loading it says why."""
        if self._fetch is None or self._is_closed:
            return
        fetch = self._fetches.get(record.digest)
        if fetch is None:
            fetch = self._fetches[record.digest] = _Fetch(self._fetchers.submit(_tried, self._fetch, record))
        fetch.num_waiting += 1
        try:
            await asyncio.wait([asyncio.wrap_future(fetch.done)])  # not cancelled with its caller
        finally:
            fetch.num_waiting -= 1
            if not fetch.num_waiting:  # nobody else waits: if it has not begun it need not
                fetch.done.cancel()
                del self._fetches[record.digest]

    async def _queued(self, waiter: _Waiter, max_wait_s: float | None) -> Lease:
        """A lease, with its load begun, when this one's turn has come."""
        self._loop = asyncio.get_running_loop()
        self._queue.setdefault(waiter.record.digest, {})[waiter] = None
        self._serve()  # room may have been made on another thread just before
        try:
            async with asyncio.timeout(max_wait_s):
                return await waiter.leased
        except TimeoutError:
            self._leave(waiter)
            raise AdapterCapacityError(self.residency.max_bytes, max_wait_s or 0.0) from None
        except asyncio.CancelledError:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Remove a waiter; return a lease that came too late."""
        digest = waiter.record.digest
        waiters = self._queue.get(digest, {})
        if waiter in waiters:
            del waiters[waiter]
            if not waiters:
                del self._queue[digest]
        elif waiter.leased.done() and not waiter.leased.cancelled() and waiter.leased.exception() is None:
            _release_unused(waiter.leased.result())

    def _begun(
        self, record: AdapterRecord, lowered: LoweredAdapter | None, *, is_first: bool = False
    ) -> Lease | None:
        """A lease, with its load begun; None if there is no room, or others are waiting for it."""
        if self._is_closed:
            raise _closed()
        may_load = is_first or not self._queue
        return self.residency.lease(record, partial(self._fill, record, lowered) if may_load else None)

    def _fill(self, record: AdapterRecord, lowered: LoweredAdapter | None) -> None:
        filling = self._threads.submit(self.residency.fill, record, lowered)
        filling.add_done_callback(lambda done: self._give_up_cancelled(record, done))

    def _room(self) -> None:
        """Note that there may be room for one more; callable from any thread."""
        if self._queue and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._serve)

    def _serve(self) -> None:
        """Start loads for those who are first by priority, and of these have waited longest."""
        while self._queue:
            digest = max(self._queue, key=self._priority)  # the first of several
            waiters = self._queue[digest]
            while waiters:
                waiter = next(iter(waiters))
                if not waiter.leased.done():
                    lease = self._begun(waiter.record, waiter.lowered, is_first=True)
                    if lease is None:
                        return
                    waiter.leased.set_result(lease)
                del waiters[waiter]
            del self._queue[digest]

    def _priority(self, digest: str) -> int:
        """The highest of those who wait for an adapter."""
        return max(waiter.priority for waiter in self._queue[digest])

    def _give_up_cancelled(self, record: AdapterRecord, filling: Future[None]) -> None:
        if filling.cancelled():
            self.residency.give_up(record, _closed())


def _tried(fetch: FetchAdapter, record: AdapterRecord) -> None:
    """Fetch, without an error: the load that follows meets it again, and tells those who wait."""
    with contextlib.suppress(Exception):
        fetch(record)


def _release_unused(lease: Lease) -> None:
    """Return a lease once its adapter is loaded; if loading fails there is nothing to return."""
    lease.adapter.loaded.add_done_callback(lambda loaded: lease.release())


def _closed() -> DrainingError:
    return DrainingError("the server is shutting down")
