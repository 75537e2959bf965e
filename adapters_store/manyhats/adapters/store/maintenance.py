"""Maintenance of a store, with or without a server: verify every byte, export a version."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.disk.durable import write_file
from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import ArgumentInvalidError, TaskNotFoundError
from manyhats.adapters.store.artifacts.storage import ArtifactStorage
from manyhats.adapters.store.catalogue.catalogue import Catalogue

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Verified:
    """The result for one artifact.

    Attributes:
        digest: the artifact's.
        status: whether its stored bytes still have that digest.
        names: the versions that need it, as ``task@3``.
    """

    digest: str
    status: Literal["ok", "damaged", "missing"]
    names: tuple[str, ...]


def verify(catalogue: Catalogue, storage: ArtifactStorage) -> Iterator[Verified]:
    """Read and digest every artifact that a version needs, lazily, one at a time.

    At the end, versions that need a damaged or missing one become FAILED, and those that are whole again no longer are.

    Raises:
        StoreUnavailableError: the storage or the catalogue cannot be read.
    """
    records = list(_records(catalogue))
    needed_by: dict[str, list[AdapterRecord]] = defaultdict(list)
    for record in records:
        for digest in dict.fromkeys(part.digest for part in record.parts):
            needed_by[digest].append(record)
    published = storage.digests()
    faults: dict[str, str] = {}
    for digest, needing in sorted(needed_by.items()):
        status = _status(storage, digest, published)
        if status != "ok":
            if not catalogue.named([digest]):
                continue  # deleted in the meantime
            faults[digest] = status
        yield Verified(digest, status, tuple(record.name for record in needing))
    for record in records:
        _mark(catalogue, record, faults)


def export_version(record: AdapterRecord, storage: ArtifactStorage, directory: Path) -> tuple[Path, ...]:
    """Write the files of a version to a new or empty directory.

    A plain version's files are written as they were registered, a composed one's to ``part-0``, ``part-1``, ….

    Returns:
        The version that was written.

    Raises:
        ArgumentInvalidError: the directory is not empty.
        DataLossError: stored bytes are damaged; nothing is written then.
        StoreError: it cannot be written.
    """
    # All are read before any is written: an export is whole or fails.
    parts = [storage.read(part.digest) for part in record.parts]
    with store_errors():
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ArgumentInvalidError("directory", "is not empty")
        if not record.is_composed:
            return _write(directory, parts[0])
        return tuple(path for i, files in enumerate(parts) for path in _write(directory / f"part-{i}", files))


def _records(catalogue: Catalogue) -> Iterator[AdapterRecord]:
    after = ("", 0)
    while page := catalogue.page(task_id="", after=after, max_records=_PAGE):
        yield from page
        after = (page[-1].task_id, page[-1].version)


def _status(
    storage: ArtifactStorage, digest: str, published: frozenset[str]
) -> Literal["ok", "damaged", "missing"]:
    if digest not in published:
        return "missing"
    return "ok" if storage.is_whole(digest) else "damaged"


def _mark(catalogue: Catalogue, record: AdapterRecord, faults: Mapping[str, str]) -> None:
    status = next((faults[part.digest] for part in record.parts if part.digest in faults), "")
    reason = f"its stored files are {status}" if status else ""
    is_failed = record.state is AdapterState.FAILED
    if bool(reason) == is_failed:
        return
    try:
        catalogue.set_failure(record.task_id, record.version, reason)
    except TaskNotFoundError:
        return  # deleted in the meantime


def _write(directory: Path, files: Mapping[str, bytearray]) -> tuple[Path, ...]:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        write_file(directory / name, content, 0o666)
    return tuple(directory / name for name in files)
