"""Following links no further than a directory reaches, by descriptors that themselves follow none.

A link is resolved to a path first. That path must lie under the root, and is then walked down from the root one
component at a time, each opened without following: a link put there in between leads nowhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyhats.adapters.errors import AdapterUnsafeError

_FLAGS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_DIRECTORY = os.O_RDONLY | _FLAGS
# On the way a directory need only be searchable; without O_PATH, readable too.
_PASS_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | _FLAGS
# O_NONBLOCK: opening must not wait, should a pipe take the file's place after the check.
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
# What opening a path fails with if it is gone, or never existed.
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a directory lies; links in it may lead to regular files under its root.

    Attributes:
        root: resolved.
        path: of the directory, resolved; under ``root``.
    """

    root: Path
    path: Path

    def open_target(self, name: str, link: str) -> int:
        """Descriptor of the file that a link in this directory leads to; the caller closes it.

        Args:
            name: of the link, for errors.
            link: what it holds.

        Raises:
            AdapterUnsafeError: it leads out of the root, to nothing, or to something other than a regular file.
            OSError: what it leads to cannot be opened.
        """
        target = resolved(self.path / link)
        if target is None or not target.is_relative_to(self.root):
            raise AdapterUnsafeError(name, "is a symbolic link that leads out of the root it was found under")
        *parents, file = target.relative_to(self.root).parts or (".",)
        try:
            parent = walk(self.root, parents, _PASS_DIRECTORY)
            try:
                # Checked before opening too: opening a device can act on it.
                check_regular(name, os.stat(file, dir_fd=parent, follow_symlinks=False))
                return os.open(file, OPEN_FILE, dir_fd=parent)
            finally:
                os.close(parent)
        except OSError as error:
            if error.errno in _LEADS_NOWHERE:
                raise AdapterUnsafeError(name, "is a symbolic link that leads to no file") from error
            raise


def resolved(path: Path) -> Path | None:
    """``path`` with every link in it resolved; None if there are too many. A loop stays as it is."""
    try:
        return Path(os.path.realpath(path))
    except RecursionError:  # the standard library calls itself for each link of a chain
        return None


def walk(root: Path, parts: Sequence[str], flags: int = OPEN_DIRECTORY) -> int:
    """Descriptor of the directory ``root/parts``, reached one component at a time without following links.

    Args:
        root: where to begin.
        parts: plain names.
        flags: to open the last directory with.

    Raises:
        OSError: a component is not a directory, or may not be traversed.
    """
    names = [str(root), *parts]
    descriptor = os.open(names[0], flags if len(names) == 1 else _PASS_DIRECTORY)
    for index, name in enumerate(names[1:], start=2):
        parent = descriptor
        try:
            descriptor = os.open(name, flags if index == len(names) else _PASS_DIRECTORY, dir_fd=parent)
        finally:
            os.close(parent)
    return descriptor


def check_regular(name: str, status: os.stat_result) -> None:
    """Refuse anything but a regular file.

    Raises:
        AdapterUnsafeError: it is a link, directory, pipe, socket or device.
    """
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device or socket")
    raise AdapterUnsafeError(name, f"is {kind}; only regular files are read")
