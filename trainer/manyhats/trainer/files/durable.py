"""Files and directories that are complete or absent, even after a crash: staged, synced, renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from manyhats.adapters.disk.durable import sync_directory, write_file

_STAGED = ".partial"
_MODE = 0o644


def write_files(directory: Path, files: Mapping[str, bytes], replaced: Collection[str] = ()) -> None:
    """Write files into a directory; once all are on disk, they are renamed into place in the given order.

    Args:
        directory: must exist.
        files: name → content.
        replaced: names to remove, if present, before the first file is renamed into place.

    Raises:
        OSError: one cannot be written; what was staged is removed.
    """
    staged = {name: _staged(directory / name) for name in files}
    try:
        for name, content in files.items():
            write_file(staged[name], content, _MODE)
        for name in replaced:
            with suppress(FileNotFoundError):
                os.unlink(directory / name)
        for name in files:
            os.replace(staged[name], directory / name)
        sync(directory)
    finally:
        for path in staged.values():
            with suppress(OSError):
                os.unlink(path)


def write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Create a directory of files, replacing an existing one; it is renamed into place once they are on disk.

    Raises:
        OSError: it cannot be written; what was staged is removed, and an existing directory is kept.
    """
    staged, aside = _staged(directory), _staged(directory)
    try:
        os.mkdir(staged)
        for name, content in files.items():
            write_file(staged / name, content, _MODE)
        sync(staged)
        if directory.exists():
            os.rename(directory, aside)
        _rename_or_undo(staged, directory, aside)
        sync(directory.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _rename_or_undo(staged: Path, directory: Path, aside: Path) -> None:
    try:
        os.rename(staged, directory)
    except OSError:
        with suppress(FileNotFoundError):
            os.rename(aside, directory)
        raise


def remove_directory(directory: Path) -> None:
    """Remove a directory: it disappears in one step, whatever then happens to its files.

    Raises:
        OSError: it cannot be removed.
    """
    aside = _staged(directory)
    os.rename(directory, aside)
    shutil.rmtree(aside)


def remove_staged(directory: Path) -> None:
    """Remove what a killed process left staged in a directory; nobody may be writing to it.

    Raises:
        OSError: it cannot be removed.
    """
    for path in directory.glob(f".*{_STAGED}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            os.unlink(path)


def sync(directory: Path) -> None:
    """Sync a directory, or a link to one, so that its entries are on disk."""
    sync_directory(directory.resolve())


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{_STAGED}")
