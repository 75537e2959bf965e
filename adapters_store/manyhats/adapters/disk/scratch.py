"""Private directories for incoming files: uploads, and downloads of a source.

Every directory is locked by the process that uses it, so that a sweep can tell what a crash left behind from what
another process is filling.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import QuotaExceededError
from manyhats.adapters.finish_rate import FinishRate

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class ScratchDirectory:
    """An empty directory with one owner, who removes it with ``close``.

    Attributes:
        descriptor: of the directory, open until ``close``.
    """

    def __init__(self, path: Path, descriptor: int, on_close: Callable[[], None]) -> None:
        self.descriptor = descriptor
        self._path = path
        self._on_close = on_close
        self._is_open = True

    def create(self, name: str) -> int:
        """Descriptor of a new file in it, to write and read; the caller closes it.

        Raises:
            StoreError: it cannot be made.
        """
        with store_errors():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, 0o600, dir_fd=self.descriptor)

    def close(self) -> None:
        """Remove it and everything in it. Safe to repeat."""
        if not self._is_open:
            return
        self._is_open = False
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self.descriptor)
        self._on_close()


class Scratch:
    """Makes scratch directories under one root, which several processes may share. Thread-safe.

    Args:
        root: created if missing; whatever is there belongs to the store.
        max_directories: at a time, in this process.

    Raises:
        StoreError: ``root`` cannot be made.
    """

    def __init__(self, root: Path, max_directories: int) -> None:
        self._root = root
        self._is_temporary = False
        self._max_directories = max_directories
        self._free = threading.BoundedSemaphore(max_directories)
        self._rate = FinishRate()
        with store_errors():
            root.mkdir(parents=True, exist_ok=True)

    @classmethod
    def temporary(cls, max_directories: int) -> Self:
        """A scratch with its own root among the system's temporary files, removed by ``close``."""
        with store_errors():
            scratch = cls(Path(tempfile.mkdtemp(prefix="manyhats-")), max_directories)
        scratch._is_temporary = True
        return scratch

    def close(self) -> None:
        """Remove a temporary root; any other stays."""
        if self._is_temporary:
            shutil.rmtree(self._root, ignore_errors=True)

    def open(self) -> ScratchDirectory:
        """A new, empty directory.

        Raises:
            QuotaExceededError: the limit of open directories is reached.
            StoreError: it cannot be made.
        """
        if not self._free.acquire(blocking=False):
            raise QuotaExceededError(
                "max_transfers",
                f"{self._max_directories} uploads and downloads are in progress; try again when one has ended",
                self._rate.wait_s(1),
            )
        try:
            path, descriptor = self._make()
        except BaseException:
            self._free.release()
            raise
        return ScratchDirectory(path, descriptor, self._closed)

    def _closed(self) -> None:
        self._rate.finished()
        self._free.release()

    @contextlib.contextmanager
    def directory(self) -> Iterator[ScratchDirectory]:
        """``open``, and ``close`` at the end."""
        directory = self.open()
        try:
            yield directory
        finally:
            directory.close()

    def sweep(self) -> int:
        """Remove directories that nobody uses; returns how many."""
        with store_errors():
            return sum(_remove_unused(self._root / name) for name in os.listdir(self._root))

    def _make(self) -> tuple[Path, int]:
        with store_errors():
            while True:
                path = self._root / uuid.uuid4().hex
                path.mkdir(mode=0o700)
                descriptor = _lock(path)
                if descriptor is not None:
                    return path, descriptor


def _remove_unused(path: Path) -> bool:
    descriptor = _lock(path)
    if descriptor is None:
        return False
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
    return True


def _lock(path: Path) -> int | None:
    """Descriptor of a directory, locked; None if another has it or it is gone."""
    try:
        descriptor = os.open(path, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweep may have removed it before the lock was taken.
        if os.fstat(descriptor).st_nlink and path.exists():
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
