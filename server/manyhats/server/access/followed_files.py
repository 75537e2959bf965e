"""Files that are read again when they change: certificates, keys and tokens outlive no process restart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from manyhats.server.errors import ConfigError

_log = structlog.get_logger("manyhats.files")

T = TypeVar("T")
_Stamp = tuple[tuple[int, ...] | None, ...]


class FollowedFiles(Generic[T]):
    """What some files hold now. Safe in any thread.

    A change that cannot be read (a file half written, a key that is not the certificate's) is logged once, and
    what was read before stays.

    Args:
        paths: the files; links are followed, so that one may be switched to another file.
        read: reads them; called at once, and after each change.

    Raises:
        ConfigError: ``read`` raised it the first time.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        # Taken before reading: a change in between is then seen as one.
        self._stamp = self._current_stamp()
        self._value = read()

    @property
    def current(self) -> T:
        """What they hold; costs a ``stat`` of each."""
        stamp = self._current_stamp()
        with self._lock:
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._value

    def _reload(self) -> None:
        names = [path.name for path in self._paths]
        try:
            self._value = self._read()
        except ConfigError as error:
            _log.error("files not reloaded, the old content stays", files=names, reason=str(error))
        else:
            _log.info("files reloaded", files=names)

    def _current_stamp(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
