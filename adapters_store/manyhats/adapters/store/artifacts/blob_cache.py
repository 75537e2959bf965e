"""A bounded directory of blobs by SHA-256: copies of what is stored elsewhere, never trusted."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import uuid
from pathlib import Path

from manyhats.adapters.disk.file_lock import FileLock
from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import StoreError

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[0-9a-f]{64}")
_LOCK_WAIT_S = 5.0
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class BlobCache:
    """Keeps what was used last, up to a size. Processes may share its directory. Thread-safe.

    A blob is digested on every read; a damaged one counts as missing. One that is evicted while being read stays whole
    for its reader, who has it open. A cache that cannot be written is not an error but logged, since everything in it
    is also stored elsewhere.

    Args:
        directory: created if missing; it belongs to the cache alone.
        max_bytes: of all blobs together.

    Raises:
        StoreError: the directory cannot be created.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._blobs = directory / "blobs"
        with store_errors():
            self._blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = FileLock(directory / "lock", _LOCK_WAIT_S)

    def get(self, sha256: str, max_bytes: int) -> bytearray | None:
        """The blob if it is here, whole and not over ``max_bytes``, which counts as a use."""
        path = self._path(sha256)
        try:
            data = _read(path, max_bytes)
        except OSError:
            return None
        if data is not None and hashlib.sha256(data).hexdigest() == sha256:
            return data
        _LOG.warning("a damaged copy was removed from the artifact cache")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def has(self, sha256: str) -> bool:
        """Whether a blob is here, maybe damaged; this is no use of it."""
        return self._path(sha256).exists()

    def put(self, sha256: str, content: bytes | bytearray) -> None:
        """Keep a blob, evicting the least recently used; one that would not fit alone is not kept."""
        path = self._path(sha256)
        if len(content) > self._max_bytes or path.exists():
            return
        try:
            # One writer at a time, since blobs being written count too.
            with self._lock.alone(), store_errors():
                self._make_room(len(content))
                self._write(path, content)
        except StoreError as error:
            _LOG.warning("the artifact cache cannot be written: %s", error)

    def _path(self, sha256: str) -> Path:
        if not _NAME.fullmatch(sha256):
            raise ValueError(f"not a SHA-256: {sha256!r}")
        return self._blobs / sha256

    def _make_room(self, num_bytes: int) -> None:
        entries = []
        for entry in os.scandir(self._blobs):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                entries.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) + num_bytes - self._max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size

    def _write(self, path: Path, content: bytes | bytearray) -> None:
        # Not synced: what a power failure leaves incomplete does not match its digest.
        partial = self._blobs / f"{uuid.uuid4().hex}.part"
        try:
            partial.write_bytes(content)
            os.rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _read(path: Path, max_bytes: int) -> bytearray | None:
    """A regular file's content; None if it is not one, is too large, or is shorter than its size."""
    with open(os.open(path, _READ), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            return None
        os.utime(file.fileno())
        data = bytearray(status.st_size)
        return data if file.readinto(data) == len(data) else None
