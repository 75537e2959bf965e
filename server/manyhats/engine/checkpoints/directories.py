"""Directories that are complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".tmp"
_ABANDONED_AFTER_S = 86_400


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A new empty directory beside ``target``, on the same file system; removed at the end if still there.

    Raises:
        OSError: the parent directory cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove staged directories of processes that were killed; a day is longer than any work takes."""
    for path in target.parent.glob(f".{target.name}.*{_SUFFIX}"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                shutil.rmtree(path)


def publish_directory(staging: Path, target: Path, is_good: Callable[[Path], bool]) -> None:
    """Rename ``staging`` to ``target``, replacing an existing one unless that is good.

    If another process publishes the same directory, whoever is first wins.

    Raises:
        OSError: the parent directory cannot be written.
    """
    _make_readable(staging)
    for _ in range(3):
        with suppress(OSError):
            os.rename(staging, target)
            return
        if is_good(target):
            return
        with staged_directory(target) as aside, suppress(FileNotFoundError):
            os.rename(target, aside / "old")
    os.rename(staging, target)


def _make_readable(directory: Path) -> None:
    """Let other users read what was created with a temporary file's private permissions.

    A model fetched by root when an image is built is read by another user when it runs.
    """
    directory.chmod(0o755)
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
