"""Artifacts in an object store, which has neither locks nor renames.

Each publication writes its own copy, whose name tells when it began. A publisher relies on a copy less than half an
hour old, or writes a new one. Garbage collection removes copies that were old when it listed them and whose artifact no
row named after that. So it never removes a copy that is about to be named, however long it sleeps between decision and
deletion.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from manyhats.adapters.disk.digest import digest_lines, hex_digits
from manyhats.adapters.disk.object_store import ObjectStore
from manyhats.adapters.errors import AdapterTooLargeError, DataLossError, StoreUnavailableError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store.artifacts.blob_cache import BlobCache
from manyhats.adapters.store.artifacts.copies import (
    MAX_MANIFEST_BYTES,
    ArtifactCopy,
    FileHashes,
    check_files,
    delete_copies,
    is_whole,
    list_copies,
    new_copy,
    parse_manifest,
    read_file,
    read_manifest,
)
from manyhats.adapters.store.artifacts.storage import NamedDigests, Swept

# How long after its publication began a copy may be relied on, by its publisher or another.
_FRESH_S = 30 * 60.0
MAX_CLOCK_DIFFERENCE_S = 5 * 60.0
"""Between the processes of a store: much less than that, by which copies are judged."""


def open_remote_artifacts(
    url: str,
    limits: AdapterLimits,
    cache_directory: Path | None,
    cache_max_bytes: int,
    storage_options: Mapping[str, Any],
) -> RemoteArtifacts:
    """``open_artifacts`` for an object store's URL."""
    cache = None if cache_directory is None else BlobCache(cache_directory, cache_max_bytes)
    return RemoteArtifacts(ObjectStore(url, storage_options), limits, cache)


class RemoteArtifacts:
    """An ``ArtifactStorage`` in an object store.

    Args:
        objects: the store's own prefix.
        limits: how much ``read`` loads into memory at most.
        cache: keeps local copies; None for none.
        clock: unix time, seconds. Clocks of the store's processes may differ by ``MAX_CLOCK_DIFFERENCE_S``.
    """

    is_far = True

    def __init__(
        self,
        objects: ObjectStore,
        limits: AdapterLimits,
        cache: BlobCache | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._max_size_bytes = limits.max_size_bytes
        self._cache = cache
        self._clock = clock

    def claim(self, catalogue_id: str) -> None:
        """Write an object ``catalogues/<id>``, which must be the only one."""
        own = f"catalogues/{catalogue_id}"
        claims = set(self._objects.sizes("catalogues"))
        if not claims:
            self._objects.write(own, b"")
            claims = set(self._objects.sizes("catalogues"))
            if claims != {own}:
                self._objects.delete([own])  # another process was quicker
        if claims != {own}:
            raise StoreUnavailableError("store", "its artifacts belong to another catalogue")

    def check_reads(self) -> None:
        """Ask for the claim."""
        if not self._objects.sizes("catalogues"):
            raise StoreUnavailableError("store", "it holds no artifacts of a store any longer")

    def check_writes(self) -> None:
        """Does nothing: only writing an object would tell more than ``check_reads``."""

    def try_out(self) -> None:
        """Write, read, list and delete an object under ``trials``."""
        content, name = uuid.uuid4().bytes, f"trials/{uuid.uuid4().hex}"
        self._objects.write(name, content)
        found = self._objects.read(name, len(content))
        is_listed = name in self._objects.sizes("trials")
        self._objects.delete([name])
        if found != content or not is_listed:
            raise StoreUnavailableError("store", "does not have what was written to it")

    def publishing(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: see the module."""
        return contextlib.nullcontext()

    def publish(self, digest: str, files: Mapping[str, bytes | bytearray]) -> None:
        """Write a copy, unless there is a fresh and whole one.

        Raises:
            ValueError: ``files`` do not have this digest.
        """
        hashes = check_files(digest, files)
        oldest = self._clock() - _FRESH_S
        fresh = [copy for copy in self._copies(digest) if copy.published > oldest]
        if not any(is_whole(self._objects, copy) for copy in fresh):
            self._write(digest, files, digest_lines(hashes))
        for name, content in files.items():
            self._keep(hashes[name][0], content)
        self._keep(hex_digits(digest), digest_lines(hashes))

    def fetch(self, digest: str) -> None:
        """Copy an artifact to the cache, unless all of it is there; without one, do nothing.

        Raises:
            DataLossError, AdapterTooLargeError: as ``read``.
        """
        if self._cache is not None and not self._is_cached(digest, self._cache):
            self.read(digest)

    def _is_cached(self, digest: str, cache: BlobCache) -> bool:
        """Whether the cache has all of an artifact; what is damaged shows when it is read."""
        text = cache.get(hex_digits(digest), MAX_MANIFEST_BYTES)
        return text is not None and all(cache.has(sha256) for sha256, _ in parse_manifest(text).values())

    def read(self, digest: str) -> dict[str, bytearray]:
        """The files, from the cache if it has them.

        Raises:
            DataLossError: no copy is whole.
            AdapterTooLargeError: over a limit that was higher when it was published.
        """
        files = self._read_cached(digest)
        for copy in [] if files is not None else self._copies(digest):
            files = self._read_copy(copy)
            if files is not None:
                break
        if files is None:
            raise DataLossError(digest, "its stored files are missing or damaged")
        return files

    def is_whole(self, digest: str) -> bool:
        """Whether a copy is whole, read again from the object store."""
        return any(is_whole(self._objects, copy) for copy in self._copies(digest))

    def digests(self) -> frozenset[str]:
        """The artifacts that have a copy."""
        return frozenset(copy.digest for copy in list_copies(self._objects) if copy.exists)

    def remove(self, digests: Collection[str], named: NamedDigests) -> None:
        """Does nothing: they may be about to be named. ``gc`` removes them once they are old."""

    def sweep(self, named: NamedDigests) -> Swept:
        """Does nothing, for the same reason."""
        return Swept(0, 0, 0)

    def gc(self, named: NamedDigests, *, older_than_s: float) -> Swept:
        """Remove old copies that no row needs or that are superseded, and old remains of publications.

        Args:
            named: called after the copies are listed.
            older_than_s: an hour is always safe; less only if nobody is publishing.
        """
        latest = self._clock() - older_than_s
        copies = list_copies(self._objects)
        unfinished = [copy for copy in copies if not copy.exists and copy.published <= latest]
        finished = [copy for copy in copies if copy.exists]
        kept = frozenset(named({copy.digest for copy in finished}))
        unneeded = [copy for copy in finished if copy.digest not in kept and copy.published <= latest]
        unneeded += self._spare([copy for copy in finished if copy.digest in kept], latest)
        delete_copies(self._objects, unneeded + unfinished)
        size_bytes = sum(copy.size_bytes for copy in unneeded + unfinished)
        return Swept(len(unneeded), len(unfinished), size_bytes)

    def _spare(self, copies: Sequence[ArtifactCopy], latest: float) -> list[ArtifactCopy]:
        """The old copies that a newer, whole copy of the same artifact supersedes."""
        spare = []
        for _, of_artifact in groupby(copies, key=lambda copy: copy.digest):
            newest, *others = of_artifact
            old = [copy for copy in others if copy.published <= latest]
            if old and is_whole(self._objects, newest):
                spare += old
        return spare

    def _copies(self, digest: str) -> list[ArtifactCopy]:
        """The copies of an artifact, newest first."""
        return [copy for copy in list_copies(self._objects, digest) if copy.exists]

    def _write(self, digest: str, files: Mapping[str, bytes | bytearray], manifest: bytes) -> None:
        copy = new_copy(digest, self._clock())
        for name, content in files.items():
            self._objects.write(f"{copy.key}/{name}", content)
        if self._clock() - copy.published > _FRESH_S:
            raise StoreUnavailableError("store", "the object store took too long to store the artifact")
        self._objects.write(copy.manifest, manifest)

    def _read_copy(self, copy: ArtifactCopy) -> dict[str, bytearray] | None:
        """A copy's files; None if one is missing or damaged."""
        manifest = read_manifest(self._objects, copy)
        if manifest is None:
            return None
        self._check_size(manifest)
        files: dict[str, bytearray] = {}
        for name, (sha256, size) in manifest.items():
            content = self._cached(sha256, size)
            if content is None:
                content = read_file(self._objects, copy, name, sha256, size)
                if content is None:
                    return None
                self._keep(sha256, content)
            files[name] = content
        self._keep(hex_digits(copy.digest), digest_lines(manifest))
        return files

    def _read_cached(self, digest: str) -> dict[str, bytearray] | None:
        """The files, if the cache has all of them."""
        text = self._cached(hex_digits(digest), MAX_MANIFEST_BYTES)
        if text is None:
            return None
        manifest = parse_manifest(text)
        self._check_size(manifest)
        files: dict[str, bytearray] = {}
        for name, (sha256, size) in manifest.items():
            content = self._cached(sha256, size)
            if content is None:
                return None
            files[name] = content
        return files

    def _check_size(self, manifest: FileHashes) -> None:
        size = sum(size for _, size in manifest.values())
        if size > self._max_size_bytes:
            raise AdapterTooLargeError("artifact", f"has {size} bytes; the limit is {self._max_size_bytes}")

    def _cached(self, sha256: str, max_bytes: int) -> bytearray | None:
        return None if self._cache is None else self._cache.get(sha256, max_bytes)

    def _keep(self, sha256: str, content: bytes | bytearray) -> None:
        if self._cache is not None:
            self._cache.put(sha256, content)
