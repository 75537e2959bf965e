"""Adapters for requests: pinned at once where they are loaded, else loaded on other threads."""

from __future__ import annotations

import asyncio
from collections import Counter

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.background import Background
from manyhats.engine.residency import AdapterResidency, ResidentAdapter

_NUM_THREADS = 2


class AdapterLoading:
    """``AdapterResidency`` for an event loop, on which all of this is called."""

    def __init__(self, residency: AdapterResidency, background: Background) -> None:
        self._residency = residency
        self._threads = background.threads(_NUM_THREADS, "adapter-loader")
        self._tasks: Counter[str] = Counter()

    @property
    def waiting_tasks(self) -> tuple[str, ...]:
        """Task ids of requests that wait for a load."""
        return tuple(sorted(self._tasks))

    async def acquire(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> ResidentAdapter:
        """Pins an adapter; loads happen on a loader thread, so no other request waits for them.

        Args:
            record: the version.
            lowered: what it comes to, where that is at hand; None reads it.

        Raises:
            AdapterError: it cannot be loaded.
            AdapterCapacityError: every slot is in use.
        """
        resident = self._residency.try_acquire(record.digest)
        if resident is not None:
            return resident
        self._tasks[record.task_id] += 1
        loop = asyncio.get_running_loop()
        loading = loop.run_in_executor(self._threads, self._residency.acquire, record, lowered)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: self._release_unused(record.digest, done))
            raise
        finally:
            self._tasks[record.task_id] -= 1
            if not self._tasks[record.task_id]:
                del self._tasks[record.task_id]

    def close(self) -> None:
        """Starts no more loads; what has begun goes on by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _release_unused(self, digest: str, loading: asyncio.Future[ResidentAdapter]) -> None:
        if not loading.cancelled() and loading.exception() is None:
            self._residency.release(digest)
