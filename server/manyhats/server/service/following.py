"""Follows what other servers change in a shared store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine
from typing import Any

import structlog

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import AdapterError
from manyhats.server.service.backend import Backend
from manyhats.server.service.registrations import Registrations

# How often pinned adapters are tried again that could not be loaded, or for which there was no room.
_PINS_PERIOD_S = 30.0
_log = structlog.get_logger("manyhats.store")


class StoreFollower:
    """Polls the store, and keeps engine and metrics in step with it.

    A store that cannot be reached is logged once and retried; requests for known tasks still work.

    Args:
        backend: its store and engine.
        registrations: that backend's.
        period_s: between two polls.
    """

    def __init__(self, backend: Backend, registrations: Registrations, *, period_s: float) -> None:
        self._backend = backend
        self._registrations = registrations
        self._period_s = period_s
        self._is_reachable = True
        self._loading: set[asyncio.Task[None]] = set()
        self._pinning: asyncio.Task[None] | None = None
        self._pins_due_s = 0.0

    async def follow(self) -> None:
        """Follow the store; cancel to stop."""
        while True:
            await asyncio.sleep(self._period_s)
            changed = await self._changed()
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

    async def _changed(self) -> Collection[str]:
        """Tasks that changed; none if that cannot be determined."""
        try:
            changed = await asyncio.to_thread(self._backend.store.refresh)
        except Exception as error:  # noqa: BLE001 - whatever fails there, the next look may succeed
            if self._is_reachable:
                bug = None if isinstance(error, AdapterError) else error
                _log.error("store not reached; known tasks are served on", error=str(error), exc_info=bug)
            self._is_reachable = False
            return ()
        if not self._is_reachable:
            _log.info("store reached again")
        self._is_reachable = True
        return changed

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
