"""Whether requests may enter, and which are running: the only place that knows the server's state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

from manyhats.adapters.finish_rate import FinishRate
from manyhats.engine.errors import DrainingError, EngineDeadError
from manyhats.server.service.backend import Backend
from manyhats.server.service.errors import LoadingError, TooManyCallsError
from manyhats.server.service.store_health import StoreUse


class ServingState(Enum):
    """What the server can do now; the value is what ``/readyz`` answers."""

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    DEAD = "dead"


class Gate:
    """Admits requests while the server can serve them.

    ``state`` may be read from any thread; everything else belongs to the event loop.

    Args:
        heartbeat_limit_s: an engine that is silent for longer counts as stalled.
        max_calls: how many may be inside at once.
    """

    def __init__(self, *, heartbeat_limit_s: float, max_calls: int = 2048) -> None:
        self._max_calls = max_calls
        self._heartbeat_limit_s = heartbeat_limit_s
        self._backend: Backend | None = None
        self._is_draining = False
        self._num_running = 0
        self._rate = FinishRate()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def state(self) -> ServingState:
        """What the server can do now."""
        if self._is_draining:
            return ServingState.DRAINING
        if self._backend is None:
            return ServingState.LOADING
        if not self._backend.engine.is_alive:
            return ServingState.DEAD
        is_silent = self._backend.engine.silent_s > self._heartbeat_limit_s
        return ServingState.STALLED if is_silent else ServingState.READY

    @property
    def is_store_whole(self) -> bool:
        """Whether the store can be used for everything; calls that need no more of it are admitted even so."""
        return self._backend is not None and self._backend.store_health.is_whole

    @property
    def is_store_busy(self) -> bool:
        """Whether anything waits for the store."""
        return self._backend is not None and self._backend.store_health.is_busy

    @property
    def store_problems(self) -> Mapping[StoreUse, str]:
        """What the store cannot be used for, and why."""
        return {} if self._backend is None else self._backend.store_health.problems

    @property
    def backend(self) -> Backend:
        """The backend that answers requests.

        Raises:
            LoadingError: the model is not loaded yet.
        """
        if self._backend is None:
            raise LoadingError
        return self._backend

    @property
    def num_running(self) -> int:
        """The number of calls inside."""
        return self._num_running

    @property
    def is_full(self) -> bool:
        """Whether the limit of calls inside is reached."""
        return self._num_running >= self._max_calls

    def full_error(self) -> TooManyCallsError:
        """What to tell a caller while ``is_full``."""
        return TooManyCallsError(self._max_calls, self._rate.wait_s(self._num_running))

    def open(self, backend: Backend) -> None:
        """Let requests in; ``backend`` answers them."""
        self._backend = backend

    def drain(self) -> None:
        """Refuse new requests from now on; those inside continue."""
        self._is_draining = True

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one call inside.

        A stalled engine still admits: it may recover, and the caller's deadline bounds the wait.

        Raises:
            LoadingError, DrainingError, EngineDeadError: it cannot be served now.
            TooManyCallsError: ``is_full``.
        """
        self._check()
        if self.is_full:
            raise self.full_error()
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            self._rate.finished()
            if self._num_running == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is inside."""
        await self._idle.wait()

    def _check(self) -> None:
        match self.state:
            case ServingState.LOADING:
                raise LoadingError
            case ServingState.DRAINING:
                raise DrainingError("the server is shutting down")
            case ServingState.DEAD:
                raise EngineDeadError("the engine has stopped; the server is shutting down")
