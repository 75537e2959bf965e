"""Reading files that someone else wrote: by directory descriptor, never out of their root, regular files only.

What was checked is what is read: a directory, and what a link leads to, is walked down from its root by descriptors, a
file is checked on the descriptor that it is then read from, and a file that changes meanwhile is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from manyhats.adapters.disk.links import OPEN_DIRECTORY, OPEN_FILE, Place, check_regular, resolved, walk
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    SourceNotAllowedError,
    SourceNotFoundError,
    StoreUnavailableError,
    shown,
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MAX_URI_LENGTH = 4096
_MAX_ENTRIES = 4096
_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An open regular file of a source directory.

    Attributes:
        name: inside the directory.
        size_bytes: when it was opened.
    """

    name: str
    size_bytes: int
    _descriptor: int
    _identity: tuple[int, ...]

    def read_start(self, num_bytes: int) -> bytes:
        """The first ``num_bytes``, or fewer if the file is shorter.

        Raises:
            StoreUnavailableError: a disk error.
        """
        try:
            return os.pread(self._descriptor, num_bytes, 0)
        except OSError as error:
            raise _read_error(self.name, error) from error

    def read(self) -> bytearray:
        """The whole file.

        Raises:
            AdapterInvalidError: it changed since it was opened.
            StoreUnavailableError: a disk error.
        """
        data = bytearray(self.size_bytes)
        try:
            count = self._fill(memoryview(data))
            is_same = _identity(os.fstat(self._descriptor)) == self._identity
        except OSError as error:
            raise _read_error(self.name, error) from error
        if count != len(data) or not is_same:
            raise AdapterInvalidError(self.name, "changed while it was read")
        return data

    def sha256(self) -> str:
        """SHA-256 of the whole file, in hexadecimal digits; read in pieces.

        Raises:
            AdapterInvalidError: it changed since it was opened.
            StoreUnavailableError: a disk error.
        """
        digest = hashlib.sha256()
        position = 0
        try:
            # One byte more than there was reveals a file that grows, however long it grows.
            while piece := os.pread(
                self._descriptor, min(_READ_BYTES, self.size_bytes + 1 - position), position
            ):
                digest.update(piece)
                position += len(piece)
            is_same = _identity(os.fstat(self._descriptor)) == self._identity
        except OSError as error:
            raise _read_error(self.name, error) from error
        if position != self.size_bytes or not is_same:
            raise AdapterInvalidError(self.name, "changed while it was read")
        return digest.hexdigest()

    def _fill(self, view: memoryview) -> int:
        """Read into ``view`` until it is full or the file ends; how many bytes that were."""
        position = 0
        while position < len(view):
            count = os.preadv(self._descriptor, [view[position : position + _READ_BYTES]], position)
            if count == 0:
                break
            position += count
        return position


@dataclass(frozen=True, slots=True)
class SourceDirectory:
    """An open directory; everything in it is reached through its descriptor.

    With a place, links in it are followed to whatever lies under the place's root; without one, none is followed.
    """

    _descriptor: int
    _place: Place | None = None

    def names(self) -> tuple[str, ...]:
        """Its entries, sorted.

        Raises:
            AdapterTooLargeError: over 4096 entries.
            StoreUnavailableError: a disk error.
        """
        try:
            with os.scandir(self._descriptor) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MAX_ENTRIES + 1)]
        except OSError as error:
            raise _read_error("directory", error) from error
        if len(names) > _MAX_ENTRIES:
            raise AdapterTooLargeError("directory", f"has over {_MAX_ENTRIES} entries")
        return tuple(sorted(names))

    def subdirectories_with(self, file: str) -> tuple[str, ...]:
        """Names of the real subdirectories that hold an entry ``file``, sorted."""
        return tuple(name for name in self.names() if self._holds(name, file))

    def _holds(self, name: str, file: str) -> bool:
        try:
            descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=self._descriptor)
        except OSError:
            return False  # not a directory, or not readable: not a candidate
        try:
            return _exists(file, descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def open_file(self, name: str, max_bytes: int) -> Iterator[SourceFile]:
        """Open a regular file of this directory, or one that a link in it leads to.

        Raises:
            AdapterInvalidError: it does not exist or may not be read.
            AdapterUnsafeError: it is a directory, pipe, socket or device, or a link that leads out of the root.
            AdapterTooLargeError: it is larger than ``max_bytes``.
            StoreUnavailableError: a disk error, or no free descriptor.
        """
        try:
            descriptor = self._open(name)
        except OSError as error:
            raise _read_error(name, error) from error
        try:
            status = os.fstat(descriptor)
            check_regular(name, status)
            if status.st_size > max_bytes:
                raise AdapterTooLargeError(name, f"has {status.st_size} bytes; the limit is {max_bytes}")
            yield SourceFile(name, status.st_size, descriptor, _identity(status))
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int:
        status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        if self._place is not None and stat.S_ISLNK(status.st_mode):
            return self._place.open_target(name, os.readlink(name, dir_fd=self._descriptor))
        # Checked before opening too: opening a device can act on it.
        check_regular(name, status)
        return os.open(name, OPEN_FILE, dir_fd=self._descriptor)


@contextlib.contextmanager
def open_source(uri: str, roots: Sequence[Path]) -> Iterator[SourceDirectory]:
    """Open the directory that ``uri`` names, if it lies under one of ``roots``.

    Links on the way to the directory are resolved first, and the result must lie under a root; then the path is walked
    again by descriptors that follow no link, so that a link put there in between leads nowhere. Links in the directory
    are followed likewise, to whatever lies under the same root.

    Args:
        uri: an absolute path, a path relative to a root, or ``file:///…``.
        roots: directories, resolved.

    Raises:
        SourceNotAllowedError: another scheme, or outside every root, or unreadable.
        SourceNotFoundError: nothing is there.
        AdapterInvalidError: it is not a directory.
    """
    place = _locate(uri, _parse_uri(uri), roots)
    try:
        descriptor = walk(place.root, place.path.relative_to(place.root).parts)
    except OSError as error:
        raise _source_error(uri, error) from None
    try:
        yield SourceDirectory(descriptor, place)
    finally:
        os.close(descriptor)


def open_local(path: Path) -> contextlib.AbstractContextManager[SourceDirectory]:
    """Open a directory for the user who runs this program: links in it may lead wherever that user may read.

    Raises:
        SourceNotAllowedError: it may not be read.
        SourceNotFoundError: nothing is there.
        AdapterInvalidError: it is not a directory.
    """
    return open_source(os.path.join(os.getcwd(), path), [Path("/")])


def _parse_uri(uri: str) -> Path:
    if not uri:
        raise SourceNotFoundError("uri", "is empty")
    if len(uri) > _MAX_URI_LENGTH or not uri.isprintable():
        raise SourceNotAllowedError(uri, f"a source has at most {_MAX_URI_LENGTH} printable characters")
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return Path(uri)
    if scheme.group(1).lower() != "file":
        raise SourceNotAllowedError(
            uri, f"the scheme '{shown(scheme.group(1))}' is not served; give a path on the server"
        )
    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or not path.isprintable():
        raise SourceNotAllowedError(uri, "a file uri is file:// followed by an absolute path on the server")
    return Path(path)


def _locate(uri: str, path: Path, roots: Sequence[Path]) -> Place:
    """The root that ``path`` lies under, and the path with every link resolved."""
    is_outside = False
    for root in roots:
        target = resolved(root / path)
        if target is None or not target.is_relative_to(root):
            is_outside = True
        elif path.is_absolute() or os.path.exists(target):
            return Place(root, target)
    # Only for paths under a root does an error reveal whether something exists.
    if is_outside or not roots:
        raise SourceNotAllowedError(uri, _outside(path, roots))
    raise SourceNotFoundError(
        uri, "no allowed root has this directory; `manyhats adapters upload` sends one from another machine"
    )


def _outside(path: Path, roots: Sequence[Path]) -> str:
    """That a path lies outside, and what to do; a root is named only to callers whose path leads right beside it."""
    if not roots:
        return "lies outside the allowed roots: there are none; `manyhats adapters upload` sends the files"
    near = sorted(str(root) for root in roots if root.parent != root and path.is_relative_to(root.parent))
    named = f" ({shown(', '.join(near))})" if near else ""
    return (
        f"lies outside the allowed roots{named}; give a path in one of them, or send the files with "
        "`manyhats adapters upload`"
    )


def _source_error(uri: str, error: OSError) -> AdapterError:
    if error.errno == errno.ENOENT:
        return SourceNotFoundError(uri, "nothing is there")
    if error.errno == errno.ENOTDIR:
        return AdapterInvalidError(uri, "is not a directory")
    if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG):
        return SourceNotAllowedError(uri, f"may not be read: {error.strerror}")
    return StoreUnavailableError(uri, f"cannot be read: {error.strerror}")


def _read_error(name: str, error: OSError) -> AdapterError:
    """The artifact's fault if it is; otherwise that of the server's disk."""
    if error.errno == errno.ENOENT:
        return AdapterInvalidError(name, "is missing")
    if error.errno == errno.ELOOP:
        return AdapterUnsafeError(name, "is a symbolic link; only regular files are read")
    if error.errno == errno.ENXIO:  # it was not one when it was looked at
        return AdapterUnsafeError(name, "is a device or socket; only regular files are read")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AdapterInvalidError(name, f"may not be read: {error.strerror}")
    return StoreUnavailableError(name, f"cannot be read: {error.strerror}")


def _exists(name: str, descriptor: int) -> bool:
    try:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except OSError:
        return False
    return True


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
