"""Files, and a directory's entries, that are on the disk when a call returns."""

from __future__ import annotations

import os
from pathlib import Path

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def write_file(path: Path, content: bytes | bytearray, mode: int) -> None:
    """Write a new file.

    Raises:
        OSError: it already exists, or cannot be written in full.
    """
    descriptor = os.open(path, _CREATE, mode)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Sync a directory, so that its entries are on the disk.

    Raises:
        OSError: it is not a directory, is a link to one, or cannot be synced.
    """
    descriptor = os.open(directory, _OPEN_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
