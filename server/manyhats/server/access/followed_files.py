"""Files that are reloaded when they change: new certificates, keys and tokens need no restart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from manyhats.server.access.errors import ConfigError

_log = structlog.get_logger("manyhats.files")

T = TypeVar("T")
_Stamp = tuple[tuple[int, ...] | None, ...]


class FollowedFiles(Generic[T]):
    """The current content of some files. Thread-safe.

    A change that cannot be read (a half-written file, a key that does not match the certificate) is logged once, and
    the old content stays.

    Args:
        paths: the files; links are followed, so that one may be switched to another file.
        read: reads them; called at once and after each change.

    Raises:
        ConfigError: ``read`` raised it the first time.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        # Taken before reading, so that a change in between is noticed.
        self._stamp = self._current_stamp()
        self._value = read()
        self._is_outdated = False

    @property
    def current(self) -> T:
        """The content; costs a ``stat`` of each file."""
        stamp = self._current_stamp()
        with self._lock:
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._value

    @property
    def is_outdated(self) -> bool:
        """Whether they have changed and could not be read: then ``current`` is what they were."""
        self.current  # noqa: B018 - looks whether they have changed
        return self._is_outdated

    def _reload(self) -> None:
        names = [path.name for path in self._paths]
        try:
            self._value = self._read()
        except ConfigError as error:
            self._is_outdated = True
            _log.error("files not reloaded; the old content stays", files=names, reason=str(error))
        else:
            self._is_outdated = False
            _log.info("files reloaded", files=names)

    def _current_stamp(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
