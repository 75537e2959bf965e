"""Artifacts in a directory that several processes share: each is complete or absent.

``<root>/artifacts/<64 hexadecimal digits>/`` holds an artifact; ``<root>/staging/`` holds what is being added or
removed. Publication writes to staging, syncs each file and the directory, digests what was written, and renames; so
whatever has an artifact's name is complete. Anyone with files in staging, or an artifact that no row names yet, holds
the lock shared; whoever holds it exclusively may remove both, since they belong to dead processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from manyhats.adapters.disk.digest import artifact_digest, digest_of_hashes, hex_digits
from manyhats.adapters.disk.durable import sync_directory, write_file
from manyhats.adapters.disk.file_lock import FileLock
from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.disk.store_errors import store_error, store_errors
from manyhats.adapters.errors import (
    AdapterError,
    AdapterTooLargeError,
    DataLossError,
    StoreError,
    StoreUnavailableError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store.artifacts.storage import NamedDigests, Swept

ARTIFACTS = "artifacts"
"""The directory of a store that has them."""
_NAME = re.compile(r"[0-9a-f]{64}")
_MODE = 0o444  # of every file: published ones never change
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_UNNAMED = os.O_WRONLY | getattr(os, "O_TMPFILE", os.O_DIRECTORY) | os.O_CLOEXEC
# The system, or the file system, has no files without a name.
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR)
_TRIED_BYTES = 4096
# The name is taken: by a directory with entries, or by something else.
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# There is no such directory, or a link in its place.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class LocalArtifacts:
    """An ``ArtifactStorage`` in a directory, on a file system that renames atomically and has ``flock``.

    Args:
        root: created if missing.
        limits: how much ``read`` loads into memory at most.

    Raises:
        StoreError: the directory cannot be created.
    """

    is_far = False

    def __init__(self, root: Path, limits: AdapterLimits) -> None:
        self._root = root
        self._artifacts = root / ARTIFACTS
        self._staging = root / "staging"
        self._claim_file = root / "catalogue-id"
        self._is_claimed = False
        self._max_size_bytes = limits.max_size_bytes
        self._use = FileLock(root / "lock")
        self._placement = FileLock(root / "placement.lock")
        with store_errors():
            self._artifacts.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            sync_directory(root)
            sync_directory(root.parent)

    def claim(self, catalogue_id: str) -> None:
        """Record or check which catalogue names the artifacts, in ``<root>/catalogue-id``."""
        file = self._claim_file
        with store_errors():
            if not file.exists():
                self._write_claim(file, catalogue_id)
            owner = file.read_text()
        if owner != catalogue_id:
            raise StoreUnavailableError("store", "its artifacts belong to another catalogue")
        self._is_claimed = True

    def check_reads(self) -> None:
        """Whether the directory is there: not only where a file system would be mounted."""
        with store_errors():
            self._check_there()
            os.listdir(self._staging)

    def check_writes(self) -> None:
        """Write a file without a name, so that nobody sees it and nothing of it is left."""
        with store_errors():
            self._check_there()
            try:
                descriptor = os.open(self._root, _OPEN_UNNAMED, _MODE)
            except OSError as error:
                if error.errno in _NO_UNNAMED:
                    return
                raise
            try:
                os.write(descriptor, bytes(_TRIED_BYTES))
            finally:
                os.close(descriptor)

    def try_out(self) -> None:
        """Write a file in staging, as a publication would, read and delete it."""
        content, path = uuid.uuid4().bytes, self._staging / uuid.uuid4().hex
        with self._use.shared(), store_errors():
            self._check_there()
            try:
                write_file(path, content, _MODE)
                found = path.read_bytes()
            finally:
                path.unlink(missing_ok=True)
        if found != content:
            raise StoreUnavailableError("store", "does not have what was written to it")

    def publishing(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock shared."""
        return self._use.shared()

    def publish(self, digest: str, files: Mapping[str, bytes | bytearray]) -> None:
        """Write, sync, digest, rename, sync."""
        target = self._path(digest)
        # Held shared here too, so that staging is never used without it.
        with self._use.shared():
            if not self.is_whole(digest):
                self._stage_and_place(digest, files, target)
            with store_errors():
                # Whoever renamed it may have died before syncing.
                sync_directory(self._artifacts)

    def fetch(self, digest: str) -> None:
        """Does nothing: it is near."""

    def read(self, digest: str) -> dict[str, bytearray]:
        """The files of an artifact, checked.

        Raises:
            DataLossError: missing or damaged.
            AdapterTooLargeError: over a limit that was higher when it was published.
        """
        files: dict[str, bytearray] = {}
        left = self._max_size_bytes
        self._check_there()  # else every artifact would seem lost
        with self._use.shared(), _opened(digest, self._path(digest)) as directory:
            for name in directory.names():
                with directory.open_file(name, left) as file:
                    files[name] = file.read()
                left -= len(files[name])
        if artifact_digest(files) != digest:
            raise _damaged(digest)
        return files

    def is_whole(self, digest: str) -> bool:
        """Whether the stored bytes have this digest."""
        try:
            with self._use.shared(), _opened(digest, self._path(digest)) as directory:
                return _digest_of(directory) == digest
        except (DataLossError, AdapterTooLargeError):
            return False

    def digests(self) -> frozenset[str]:
        """The names that the storage assigned; others are not touched."""
        with store_errors():
            return frozenset(
                f"sha256:{name}" for name in os.listdir(self._artifacts) if _NAME.fullmatch(name)
            )

    def remove(self, digests: Collection[str], named: NamedDigests) -> None:
        """Remove what no row names, holding the lock exclusively."""
        with self._use.alone():
            trash = self._discard(frozenset(digests) - frozenset(named(digests)))
        for path in trash:
            _delete(path)

    def sweep(self, named: NamedDigests) -> Swept:
        """Remove everything in staging and what no row names, holding the lock exclusively."""
        with self._use.alone():
            with store_errors():
                unfinished = [self._staging / name for name in os.listdir(self._staging)]
            published = self.digests()
            unnamed = self._discard(published - frozenset(named(published)))
        trash = [*unfinished, *unnamed]
        with store_errors():
            size_bytes = sum(_size_bytes(path) for path in trash)
        for path in trash:
            _delete(path)
        return Swept(len(unnamed), len(unfinished), size_bytes)

    def gc(self, named: NamedDigests, *, older_than_s: float) -> Swept:
        """``sweep``; age does not matter here, since the lock tells what is in use."""
        return self.sweep(named)

    def _check_there(self) -> None:
        if not (self._claim_file if self._is_claimed else self._artifacts).exists():
            raise StoreUnavailableError("store", "its directory is not there")

    def _path(self, digest: str) -> Path:
        return self._artifacts / hex_digits(digest)

    def _write_claim(self, file: Path, catalogue_id: str) -> None:
        with self._use.alone():
            if file.exists():
                return
            staged = self._staging / uuid.uuid4().hex
            write_file(staged, catalogue_id.encode(), _MODE)
            os.rename(staged, file)
            sync_directory(self._root)

    def _stage_and_place(self, digest: str, files: Mapping[str, bytes | bytearray], target: Path) -> None:
        staged = self._staging / uuid.uuid4().hex
        try:
            with store_errors():
                _write_files(staged, files)
            with _opened(digest, staged) as directory:
                if _digest_of(directory) != digest:
                    raise StoreUnavailableError("store", "does not have what was written to it")
            self._place(staged, target, digest)
        finally:
            _delete(staged)

    def _place(self, staged: Path, target: Path, digest: str) -> None:
        """Rename to the artifact's name, one publisher at a time: another's complete copy is never replaced."""
        with self._placement.alone():
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise store_error(error) from error
                if not self.is_whole(digest):
                    trash = self._discard([digest])
                    with store_errors():
                        os.rename(staged, target)
                    for path in trash:
                        _delete(path)

    def _discard(self, digests: Collection[str]) -> list[Path]:
        """Move artifacts out of sight, each in one step; returns where those that existed are now."""
        trash = []
        for digest in digests:
            path = self._staging / uuid.uuid4().hex
            with store_errors(), contextlib.suppress(FileNotFoundError):
                os.rename(self._path(digest), path)
                trash.append(path)
        return trash


@contextlib.contextmanager
def _opened(digest: str, path: Path) -> Iterator[SourceDirectory]:
    """Open an artifact's directory; errors of it and its files become ``DataLossError``."""
    descriptor = -1
    try:
        descriptor = os.open(path, _OPEN_DIRECTORY)
        yield SourceDirectory(descriptor)
    except OSError as error:
        if error.errno in _ABSENT:
            raise DataLossError(digest, "its stored files are missing") from error
        raise store_error(error) from error
    except (AdapterTooLargeError, StoreError):
        raise
    except AdapterError as error:
        if isinstance(error.__cause__, PermissionError):
            raise store_error(error.__cause__) from error
        raise _damaged(digest) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _damaged(digest: str) -> DataLossError:
    return DataLossError(digest, "its stored files are not those that were published")


def _digest_of(directory: SourceDirectory) -> str:
    hashes: dict[str, tuple[str, int]] = {}
    for name in directory.names():
        with directory.open_file(name, sys.maxsize) as file:
            hashes[name] = (file.sha256(), file.size_bytes)
    return digest_of_hashes(hashes)


def _write_files(directory: Path, files: Mapping[str, bytes | bytearray]) -> None:
    directory.mkdir()
    for name, content in files.items():
        write_file(directory / name, content, _MODE)
    sync_directory(directory)


def _size_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _delete(path: Path) -> None:
    """Delete a file or directory in staging; the next sweep retries what cannot be deleted."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
