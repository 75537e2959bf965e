"""A lock that processes and threads hold shared, or one holds exclusively; it is released when its process dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import StoreUnavailableError

_POLL_S = 0.005


class FileLock:
    """A lock on a file, which is created if missing. Thread-safe.

    Each holder has its own descriptor, so one thread may hold the lock shared twice; but it deadlocks, until
    ``wait_s``, if it asks for it exclusively while holding it.

    Args:
        path: the file; its directory exists.
        wait_s: how long a holder may keep others waiting.
    """

    def __init__(self, path: Path, wait_s: float = 60.0) -> None:
        self._path = path
        self._wait_s = wait_s

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Hold it shared.

        Raises:
            StoreUnavailableError: someone held it exclusively for too long, or it cannot be opened.
        """
        return self._held(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold it exclusively.

        Raises:
            StoreUnavailableError: others held it for too long, or it cannot be opened.
        """
        return self._held(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _held(self, operation: int) -> Iterator[None]:
        with store_errors():
            descriptor = self._opened(operation)
        try:
            self._wait(descriptor, operation)
            yield
        finally:
            os.close(descriptor)

    def _opened(self, operation: int) -> int:
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            # Writable, for network file systems lock nothing else.
            return os.open(self._path, flags | os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno != errno.EROFS or operation != fcntl.LOCK_SH:
                raise
            # Nobody can remove what is read there.
            return os.open(self._path, flags | os.O_RDONLY)

    def _wait(self, descriptor: int, operation: int) -> None:
        """Polls, because a blocking call could not be given up."""
        deadline = time.monotonic() + self._wait_s
        while True:
            with store_errors(), contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
                return
            if time.monotonic() >= deadline:
                raise StoreUnavailableError("store", f"others have kept it locked for {self._wait_s:g} s")
            time.sleep(_POLL_S)
