"""A lock that processes and threads share, or that one has alone; it goes with a process that dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import StoreUnavailableError

_POLL_S = 0.005


class FileLock:
    """A lock on a file, made if it is missing. Safe in any thread.

    Each holder has a descriptor of its own, so one thread may share the lock twice; but it waits for itself
    where it wants it alone and has it already.

    Args:
        path: the file; its directory exists.
        wait_s: how long a holder may keep others waiting.
    """

    def __init__(self, path: Path, wait_s: float = 60.0) -> None:
        self._path = path
        self._wait_s = wait_s

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Hold it together with others who share it.

        Raises:
            StoreUnavailableError: somebody has it alone for too long, or it cannot be opened.
        """
        return self._held(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold it alone.

        Raises:
            StoreUnavailableError: others have it for too long, or it cannot be opened.
        """
        return self._held(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _held(self, operation: int) -> Iterator[None]:
        with store_errors():
            # Writable, for network file systems lock nothing else.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o644)
        try:
            self._wait(descriptor, operation)
            yield
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int, operation: int) -> None:
        """Poll, because a blocking call could not be given up."""
        deadline = time.monotonic() + self._wait_s
        while True:
            with store_errors(), contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
                return
            if time.monotonic() >= deadline:
                raise StoreUnavailableError("store", f"others have kept it locked for {self._wait_s:g} s")
            time.sleep(_POLL_S)
