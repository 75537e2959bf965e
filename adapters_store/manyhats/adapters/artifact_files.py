"""The store's files: immutable, content-addressed directories that appear whole or not at all.

``<root>/artifacts/<64 hexadecimal digits>/`` holds a published artifact; ``<root>/staging/`` what is on its
way in or out. Publication writes to staging, syncs each file and the directory, and renames; so whatever
bears an artifact's name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from manyhats.adapters.digest import artifact_digest
from manyhats.adapters.errors import AdapterError, StoreError, StoreFullError, StoreUnavailableError
from manyhats.adapters.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.reader import read_files

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_DIRECTORY = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ArtifactFiles:
    """Publishes, reads and removes artifacts under one directory.

    Raises:
        StoreError: the directory cannot be made or written, or another process has it.
    """

    def __init__(self, root: Path, limits: AdapterLimits) -> None:
        self._artifacts = root / "artifacts"
        self._staging = root / "staging"
        self._limits = limits
        with _store_errors():
            self._artifacts.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            weakref.finalize(self, os.close, _lock(root / "lock"))

    def path(self, digest: str) -> Path:
        """Where an artifact lies, published or not."""
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ValueError(f"not a digest: {digest!r}")
        return self._artifacts / match.group(1)

    def publish(self, digest: str, files: Mapping[str, bytearray]) -> Path:
        """Store an artifact under its digest; one that is there already, and whole, is left as it is.

        Raises:
            StoreError: it could not be written; nothing is published then.
        """
        target = self.path(digest)
        if self._is_whole(digest):
            return target
        staged = self._staging / uuid.uuid4().hex
        try:
            with _store_errors():
                _write(staged, files)
                self._discard(target)  # a damaged copy of the same bytes, if any
                os.rename(staged, target)
                _sync(self._artifacts)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return target

    def read(self, digest: str) -> dict[str, bytearray]:
        """The files of a published artifact, unchecked.

        Raises:
            AdapterError: it is gone, or is not what was published.
            StoreUnavailableError: the disk fails.
        """
        path = self.path(digest)
        with open_source(str(path), [path.parent]) as directory:
            return read_files(directory, self._limits)

    def remove(self, digest: str) -> None:
        """Remove an artifact if it is there."""
        with _store_errors():
            self._discard(self.path(digest))

    def sweep(self, keep: Collection[str]) -> int:
        """Remove what was never published, and artifacts whose digest is not in ``keep``.

        Only names that the store itself gives are touched.

        Returns:
            How many artifacts were removed.
        """
        kept = {self.path(digest).name for digest in keep}
        with _store_errors():
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(exist_ok=True)
            swept = [
                name
                for name in os.listdir(self._artifacts)
                if _DIRECTORY.fullmatch(name) and name not in kept
            ]
            for name in swept:
                self._discard(self._artifacts / name)
        return len(swept)

    def _is_whole(self, digest: str) -> bool:
        try:
            return artifact_digest(self.read(digest)) == digest
        except AdapterError:
            return False

    def _discard(self, path: Path) -> None:
        """Take a directory out of sight in one step, then delete it."""
        trash = self._staging / uuid.uuid4().hex
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return
        shutil.rmtree(trash, ignore_errors=True)


def _write(directory: Path, files: Mapping[str, bytearray]) -> None:
    directory.mkdir()
    for name, content in files.items():
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    _sync(directory)


def _lock(path: Path) -> int:
    """Keep other processes out of the store: their sweep would remove what this one serves."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise StoreUnavailableError("store", "is in use by another process") from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Turn errors of the file system into the store's; their text names no path."""
    try:
        yield
    except OSError as error:
        raise _store_error(error) from error


def _store_error(error: OSError) -> StoreError:
    if error.errno in _FULL:
        return StoreFullError("store", "no space is left for the artifact")
    return StoreUnavailableError("store", f"cannot be written: {error.strerror}")
