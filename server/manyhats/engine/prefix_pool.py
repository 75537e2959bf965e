"""The virtual tokens of loaded adapters, put in place by the engine's thread at the loaders' asking."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future

from manyhats.adapters.primitives import KVPrefix, PromptEmbeddings
from manyhats.engine.engine import Engine
from manyhats.engine.errors import EngineDeadError, EngineError
from manyhats.engine.jobs import Event
from manyhats.engine.kernels.interface import KVCache
from manyhats.engine.prefix import KVPrefixJob, PromptPrefixJob, ResidentPrefix

Command = Callable[[], tuple[Event, ...]]
"""Something for the engine's thread to do between steps."""


class EnginePrefixPool:
    """A ``PrefixPool`` over one engine.

    Args:
        engine: runs the jobs; touched by commands alone.
        cache: the blocks' memory.
        submit: hands a command to the engine's thread.
    """

    def __init__(self, engine: Engine, cache: KVCache, submit: Callable[[Command], None]) -> None:
        self._engine = engine
        self._cache = cache
        self._submit = submit
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Future[ResidentPrefix]] = {}
        self._is_closed = False

    def install(self, slot: int, prefix: KVPrefix | PromptEmbeddings) -> ResidentPrefix:
        """Waits until the virtual tokens are in place.

        Raises:
            EngineError: they cannot be.
        """
        job_id = f"prefix-{next(self._numbers)}"
        future: Future[ResidentPrefix] = Future()
        job = (
            KVPrefixJob(job_id, prefix, self._cache, future.set_result)
            if isinstance(prefix, KVPrefix)
            else PromptPrefixJob(job_id, prefix, slot, future.set_result)
        )
        self._waiting[job_id] = future
        try:
            if self._is_closed:  # asked after the entry is there, so that ``close`` misses none
                raise EngineDeadError("the engine has ended")
            self._submit(lambda: self._engine.add(job))
            return future.result()
        finally:
            del self._waiting[job_id]

    def remove(self, prefix: ResidentPrefix) -> None:
        """Has the blocks freed before the next step."""

        def release() -> tuple[Event, ...]:
            self._engine.scheduler.release(prefix.shared)
            return ()

        self._submit(release)

    def take(self, event: Event) -> bool:
        """Whether an event is about one of these jobs; an error then ends the wait for it."""
        future = self._waiting.get(event.job_id)
        if future is not None and isinstance(event.payload, EngineError):
            future.set_exception(event.payload)
        return future is not None

    def close(self) -> None:
        """Ends every wait; the engine's thread calls it as its last act."""
        self._is_closed = True
        for future in tuple(self._waiting.values()):
            if not future.done():
                future.set_exception(EngineDeadError("the engine has ended"))
