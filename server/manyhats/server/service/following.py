"""Follows what other servers change in a shared store, and whether it can be used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.engine.threads.apart import in_thread
from manyhats.server.service.backend import Backend
from manyhats.server.service.registrations import Registrations
from manyhats.server.service.store_health import StoreUse

T = TypeVar("T")

# Longer than the catalogue's own limits on a statement, so that a database that is only busy does not hang.
_HANG_S = 12.0
# Object storage counts requests.
_CHECK_S = 5.0
# How often pinned adapters are tried again that could not be loaded, or for which there was no room.
_PINS_PERIOD_S = 30.0


class StoreFollower:
    """Polls the store, keeps engine and metrics in step with it, and notes what it can be used for.

    A store that cannot be reached is looked at again and again; requests for tasks in memory are served meanwhile. A
    look that does not return holds up nothing but the next one.

    Args:
        backend: its store and engine; told what the store can be used for.
        registrations: that backend's.
        period_s: between two looks at the catalogue.
        check_s: between two looks at the artifacts.
        hang_s: a look that takes longer hangs.
    """

    def __init__(
        self,
        backend: Backend,
        registrations: Registrations,
        *,
        period_s: float,
        check_s: float = _CHECK_S,
        hang_s: float = _HANG_S,
    ) -> None:
        self._backend = backend
        self._registrations = registrations
        self._health = backend.store_health
        self._period_s = period_s
        self._check_s = check_s
        self._hang_s = hang_s
        self._loading: set[asyncio.Task[None]] = set()
        self._pinning: asyncio.Task[None] | None = None
        self._pins_due_s = 0.0

    async def follow(self) -> None:
        """Follow the store; cancel to stop."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_catalogue())
            for use, check in (
                (StoreUse.READ, self._backend.store.check_reads),
                (StoreUse.WRITE, self._backend.store.check_writes),
            ):
                group.create_task(self._follow_artifacts(use, check))

    async def _follow_catalogue(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            changed = await self._looked(StoreUse.CATALOGUE, self._backend.store.refresh) or ()
            for record in self._take(changed):
                self._begin(self._registrations.warm(record))
            if changed:
                self._begin(self._registrations.follow_pins(changed))
            self._try_pins_again()

    def _begin(self, loading: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(loading)
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    def _try_pins_again(self) -> None:
        """Once in a while, pin what was not there, or had no room, when it was to be pinned."""
        now_s = time.monotonic()
        if now_s >= self._pins_due_s and (self._pinning is None or self._pinning.done()):
            self._pins_due_s = now_s + _PINS_PERIOD_S
            self._pinning = asyncio.create_task(self._registrations.follow_pins())

    async def _follow_artifacts(self, use: StoreUse, check: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(self._check_s)
            await self._looked(use, check)

    async def _looked(self, use: StoreUse, look: Callable[[], T]) -> T | None:
        """The result of a look at the store, however long that takes; None if it fails."""
        # A thread of its own, which the process does not wait for at its end.
        looking = asyncio.ensure_future(asyncio.wrap_future(in_thread(look, "store-look")))
        try:
            done, _ = await asyncio.wait({looking}, timeout=self._hang_s)
            if not done:
                self._health.hangs(use)
            result = await looking
        except Exception as error:  # noqa: BLE001 - whatever fails there, the next look may succeed
            self._health.lost(use, error)
            return None
        self._health.works(use)
        return result

    def _take(self, changed: Collection[str]) -> list[AdapterRecord]:
        """Account for the tasks that changed.

        Returns:
            What to load: new versions of tasks that were loaded here, since requests for them are likely.
        """
        resident = self._backend.engine.resident_digests()
        to_load = []
        for task_id in changed:
            self._registrations.count(task_id)
            versions = self._registrations.versions(task_id)
            active = next((record for record in versions if record.state is AdapterState.ACTIVE), None)
            is_in_use = any(record.digest in resident for record in versions)
            if is_in_use and active is not None and active.digest not in resident:
                to_load.append(active)
        if changed:
            self._registrations.forget_unneeded()
        return to_load
