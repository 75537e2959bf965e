"""What the store can be used for at the moment, as far as this server knows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from enum import Enum
from threading import Lock
from typing import TypeVar

import structlog

from manyhats.adapters.errors import AdapterError, StoreUnavailableError

T = TypeVar("T")

_LOOK_S = 0.1
_log = structlog.get_logger("manyhats.store")


class StoreUse(Enum):
    """What the store is for; the value is what metrics and probes call it."""

    CATALOGUE = "catalogue"
    """Following what other servers register, and registering."""
    READ = "read"
    """Loading adapters that are not in memory."""
    WRITE = "write"
    """Keeping new versions."""


class StoreHealth:
    """Why the store cannot be used, by use; thread-safe. The server serves what it has in memory whatever is lost.

    Args:
        clock: wall time, for those who ask when the store last worked.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._problems: dict[StoreUse, str] = {}
        self._last_success_s = dict.fromkeys(StoreUse, clock())  # it has just been opened
        self._num_failures = dict.fromkeys(StoreUse, 0)
        self._hanging: set[StoreUse] = set()
        self._num_working = 0
        self._lock = Lock()

    @property
    def is_whole(self) -> bool:
        """Whether it can be used for everything."""
        return not self._problems

    @property
    def problems(self) -> dict[StoreUse, str]:
        """What it cannot be used for, and why."""
        with self._lock:
            return dict(self._problems)

    @property
    def usable(self) -> dict[str, bool]:
        """Whether it can be used, for each use."""
        return {use.value: use not in self.problems for use in StoreUse}

    @property
    def last_success_s(self) -> dict[StoreUse, float]:
        """When a look at it last succeeded, by the clock on the wall."""
        with self._lock:
            return dict(self._last_success_s)

    @property
    def num_failures(self) -> dict[StoreUse, int]:
        """How many looks at it have failed or hung, so far."""
        with self._lock:
            return dict(self._num_failures)

    def is_hanging(self, *uses: StoreUse) -> bool:
        """Whether a look at one of these uses does not return."""
        with self._lock:
            return not self._hanging.isdisjoint(uses)

    @property
    def is_busy(self) -> bool:
        """Whether anything waits for the store."""
        return self._num_working > 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count this block, on a thread, as one that waits for the store."""
        with self._lock:
            self._num_working += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_working -= 1

    def works(self, use: StoreUse) -> None:
        """Note that it can be used."""
        with self._lock:
            was_lost = self._problems.pop(use, None) is not None
            self._hanging.discard(use)
            self._last_success_s[use] = self._clock()
        if was_lost:
            _log.info("store works again", use=use.value)

    def lost(self, use: StoreUse, error: Exception) -> None:
        """Note that it cannot be used, and log that once."""
        # Anyone may ask for it: the store's own texts name no path and no host.
        text = str(error) if isinstance(error, AdapterError) else "an unexpected error, which is in the log"
        with self._lock:
            was_lost = use in self._problems
            self._problems[use] = text
            if use not in self._hanging:  # else that look has been counted
                self._num_failures[use] += 1
            self._hanging.discard(use)
        if not was_lost:
            bug = None if isinstance(error, AdapterError) else error
            _log.error(
                "store lost; what is in memory is served on", use=use.value, error=str(error), exc_info=bug
            )

    def hangs(self, use: StoreUse) -> None:
        """Note that a look at it does not return."""
        self.lost(use, _hanging())
        with self._lock:
            self._hanging.add(use)

    def check(self, *uses: StoreUse) -> None:
        """Refuse what would have to wait for a store that hangs.

        Raises:
            StoreUnavailableError: it does.
        """
        if self.is_hanging(*uses):
            raise _hanging()

    async def unless_hanging(self, work: asyncio.Future[T], *uses: StoreUse) -> T:
        """The result of work that blocks on the store, unless that hangs; the work then goes on unheard.

        Raises:
            StoreUnavailableError: it hangs.
        """
        while not (await asyncio.wait({work}, timeout=_LOOK_S))[0]:
            self.check(*uses)
        return work.result()

    def wait_unless_hanging(self, work: Future[T], *uses: StoreUse) -> T:
        """``unless_hanging`` for a thread."""
        while not wait({work}, timeout=_LOOK_S).done:
            self.check(*uses)
        return work.result()


def _hanging() -> StoreUnavailableError:
    return StoreUnavailableError("store", "has not answered for some time; try again later")
