"""The adapter store: registers, lists, resolves, loads and deletes the versions of tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.disk.scratch import Scratch
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInUseError,
    ArgumentInvalidError,
    DataLossError,
    StoreError,
    TaskNotFoundError,
)
from manyhats.adapters.formats.text_files import text_of
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import LoadedVersion, lower_version
from manyhats.adapters.lowering.reader import parse_artifact
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Registered, Registration
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.artifacts.storage import ArtifactStorage, Swept
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.store.catalogue.pages import Page, read_page
from manyhats.adapters.store.maintenance import Verified, export_version, verify
from manyhats.adapters.store.registering import Registering, require_base
from manyhats.adapters.store.upload import UploadSession
from manyhats.adapters.taskid import check_task_id, parse_name


class AdapterStore:
    """Versions of tasks: rows in a catalogue, immutable artifacts in a storage. Thread-safe.

    ``open_store`` builds one. Several processes may have a store open; ``refresh`` picks up what others changed.

    Args:
        storage: holds the artifacts.
        catalogue: holds tasks and versions.
        registering: validates and publishes.
        scratch: takes uploads.
        base: the resident base, which every adapter is checked against; None for maintenance only.
        limits: how large an adapter may be.
    """

    def __init__(
        self,
        storage: ArtifactStorage,
        catalogue: Catalogue,
        registering: Registering,
        scratch: Scratch,
        base: BaseDescription | None,
        limits: AdapterLimits,
    ) -> None:
        self._storage = storage
        self._catalogue = catalogue
        self._scratch = scratch
        self._base = base
        self._limits = limits
        self._registering = registering

    def register(
        self, registration: Registration, *, probe: Probe | None = None, prepare: Prepare | None = None
    ) -> Registered:
        """Validate an adapter, or several to be combined, and publish a copy as a version of the task.

        Repeating the same content returns the existing version, activated if requested. Repeating the same
        ``request_id`` and arguments returns the first answer. With ``validate_only`` nothing is stored: a record with
        version 0 says what it would be.

        Args:
            registration: what to register, and how.
            probe: measures the adapter's effect, which is recorded.
            prepare: called before the version becomes active.

        Raises:
            ArgumentInvalidError: too many parts; or files, which must come in an upload.
            RequestIdReusedError: the request id was used for something else.
            SourceNotAllowedError, SourceNotFoundError, SourceUnavailableError: the source cannot be opened.
            ArtifactError, BaseMismatchError: the adapter cannot be served on this base.
            DigestMismatchError: it is not the expected one.
            QuotaExceededError: a quota is exceeded.
            StoreError: it could not be written; nothing is published.

            For a part, the error's subject begins with ``parts[1]``.
        """
        return self._registering.register(registration, probe, prepare)

    def open_upload(self, registration: Registration) -> UploadSession:
        """Begin an upload; everything its header reveals is checked before a byte is accepted.

        Files that are not announced are checked as they come.

        Its ``finish`` does what ``register`` does. An interrupted upload may be repeated from the start.

        Raises:
            ArgumentInvalidError: a file cannot be accepted, or none is announced.
            ArtifactError: the files are not an adapter, or over a limit.
            DigestMismatchError: they are not the expected ones.
            QuotaExceededError: a quota is exceeded, or too many uploads are in progress.
            StoreError: the files cannot be written.
        """
        return self._registering.open_upload(registration)

    def get(self, name: str) -> AdapterRecord:
        """The version named by ``task`` (its active one) or ``task@3``.

        Raises:
            TaskIdInvalidError, TaskNotFoundError, NoActiveVersionError: there is none.
        """
        return self._catalogue.resolve(parse_name(name))

    def resolve(self, name: str) -> AdapterRecord:
        """The version that a request for ``name`` runs on; a look-up in memory.

        Raises:
            TaskIdInvalidError, TaskNotFoundError, NoActiveVersionError: there is none.
        """
        return self._catalogue.resolve(parse_name(name))

    def versions(self, task_id: str) -> tuple[AdapterRecord, ...]:
        """All versions of a task, oldest first.

        Raises:
            TaskIdInvalidError, TaskNotFoundError: there is no such task.
        """
        return self._catalogue.versions(check_task_id(task_id))

    def has_digest(self, digest: str) -> bool:
        """Whether any version of any task has this digest; a look-up in memory."""
        return self._catalogue.has_digest(digest)

    def list(self, *, task_id: str = "", page_size: int = 0, page_token: str = "") -> Page:
        """Versions ordered by task id and version.

        Args:
            task_id: only this task's; empty for all. A task that does not exist has an empty list.
            page_size: at most this many (1000 at most); 0 for 100.
            page_token: from the previous page of a list with the same ``task_id``.

        Raises:
            ArgumentInvalidError: an argument is out of range.
        """
        return read_page(self._catalogue, task_id=task_id, page_size=page_size, page_token=page_token)

    def activate(self, name: str) -> AdapterRecord:
        """Make ``task@3`` the version that ``task`` refers to.

        Raises:
            TaskIdInvalidError, TaskNotFoundError: there is no such version, or the name has none.
            DataLossError: its stored files are known to be damaged.
            StoreError: the catalogue cannot be written.
        """
        parsed = parse_name(name)
        if parsed.version is None:
            raise ArgumentInvalidError("task_id", "must name the version to activate, as in 'task@3'")
        return self._catalogue.activate(parsed.task_id, parsed.version)

    def set_pin(self, name: str, *, is_pinned: bool) -> AdapterRecord:
        """Mark what servers are to keep in memory; those that have this store open see it with ``refresh``.

        Args:
            name: ``task@3`` for one version; ``task`` for whichever is its active one, now and later.
            is_pinned: False takes the mark away again: from ``task@3``, or with ``task`` from all that the task has.

        Returns:
            The version that the name refers to now; it may still be pinned by its task's name.

        Raises:
            TaskIdInvalidError, TaskNotFoundError, NoActiveVersionError: there is none.
            StoreError: the catalogue cannot be written.
        """
        return self._catalogue.set_pin(parse_name(name), is_pinned=is_pinned)

    def pinned(self) -> tuple[AdapterRecord, ...]:
        """The versions that are to stay in memory; a look-up in memory."""
        return tuple(self._catalogue.pinned())

    def delete(
        self, name: str, *, in_use: Callable[[AdapterRecord], bool], force: bool = False
    ) -> tuple[AdapterRecord, ...]:
        """Remove one version (``task@3``) or all (``task``), and the files that no version needs any longer.

        Args:
            name: what to remove.
            in_use: whether requests run on a version. Called while nobody can resolve one, so it must be quick.
            force: remove it even so; whoever has already loaded it keeps it.

        Returns:
            What was removed.

        Raises:
            TaskIdInvalidError, TaskNotFoundError: nothing has that name.
            AdapterInUseError: it is in use and ``force`` is not given; nothing is removed.
            StoreError: the catalogue cannot be written; nothing is removed.
        """

        def refuse_in_use(records: Sequence[AdapterRecord]) -> None:
            used = next((record for record in records if not force and in_use(record)), None)
            if used is not None:
                raise AdapterInUseError(
                    used.name, "requests are running on it; force its deletion, or try again later"
                )

        removed = self._catalogue.remove(parse_name(name), refuse_in_use)
        digests = {part.digest for record in removed for part in record.parts}
        # The versions are gone, whatever happens to their bytes: a sweep finds those that cannot be removed now.
        with contextlib.suppress(StoreError):
            self._storage.remove(digests, self._catalogue.named)
        return removed

    def refresh(self) -> frozenset[str]:
        """Pick up what other processes changed.

        Returns:
            The tasks that changed since the last call, by any process.

        Raises:
            StoreUnavailableError: the catalogue cannot be read; look-ups still answer what was known.
        """
        return self._catalogue.refresh()

    def check_reads(self) -> None:
        """Check, cheaply, that stored artifacts can be read.

        Raises:
            StoreUnavailableError: none can.
        """
        self._storage.check_reads()

    def check_writes(self) -> None:
        """Check, cheaply, that artifacts can be stored.

        Raises:
            StoreError: none can.
        """
        self._storage.check_writes()

    def try_out(self) -> None:
        """Write to artifacts and catalogue, and leave nothing of it.

        Raises:
            StoreError: that is impossible.
        """
        self._storage.try_out()
        self._catalogue.check_writes()

    def clock_difference_s(self) -> float | None:
        """Seconds that the catalogue's database server is ahead of this machine's clock; None if there is none.

        Raises:
            StoreUnavailableError: the catalogue cannot be read.
        """
        return self._catalogue.clock_difference_s()

    def task_ids(self) -> frozenset[str]:
        """The tasks that have a version; a look-up in memory."""
        return self._catalogue.task_ids()

    def load(self, record: AdapterRecord) -> LoadedVersion:
        """Read a version's stored artifacts into memory.

        Raises:
            TaskNotFoundError: it was deleted in the meantime.
            DataLossError: its files are not those that were registered.
            StoreUnavailableError: the storage fails.
        """
        artifacts = []
        for part in record.parts:
            try:
                files = self._storage.read(part.digest)
            except DataLossError:
                raise self._loss(record) from None
            artifacts.append(parse_artifact(files, part.digest, self._limits))
        return LoadedVersion(record, tuple(artifacts))

    @property
    def is_far(self) -> bool:
        """Whether ``load`` waits for a network where nothing was fetched."""
        return self._storage.is_far

    def fetch(self, record: AdapterRecord) -> None:
        """Bring a version's artifacts from object storage to the local cache, if there is one, for ``load``.

        Raises:
            DataLossError: its files are not those that were registered.
            StoreUnavailableError: the storage fails.
        """
        for part in record.parts:
            self._storage.fetch(part.digest)

    def read_text(self, record: AdapterRecord) -> tuple[Mapping[str, bytes | bytearray], ...]:
        """The text files of a version, name → content; one mapping for each part that has any.

        Raises:
            TaskNotFoundError, DataLossError, StoreUnavailableError: as ``load``.
        """
        try:
            return tuple(text_of(self._storage.read(part.digest)) for part in record.parts if part.text_files)
        except DataLossError:
            raise self._loss(record) from None

    def lower(self, record: AdapterRecord) -> LoweredAdapter:
        """Read a version and lower it for the engine; its digest is the record's.

        Raises:
            TaskNotFoundError, DataLossError, StoreUnavailableError: as ``load``.
            BaseMismatchError: it was registered for another base.
            ArtifactError: it cannot be served on this one.
        """
        return lower_version(self.load(record), require_base(self._base), self._limits)

    def verify(self) -> Iterator[Verified]:
        """Verify every stored artifact; see ``maintenance.verify``."""
        return verify(self._catalogue, self._storage)

    def gc(self, *, older_than_s: float = 24 * 3600.0) -> Swept:
        """Remove artifacts that no version needs.

        Args:
            older_than_s: spares younger ones if a registration in progress cannot be told from remains (object stores).

        Raises:
            StoreUnavailableError: storage or catalogue fails.
        """
        return self._storage.gc(self._catalogue.named, older_than_s=older_than_s)

    def export(self, name: str, directory: Path) -> tuple[Path, ...]:
        """Write a version's files to a new or empty directory; see ``maintenance.export_version``."""
        record = self.get(name)
        try:
            return export_version(record, self._storage, directory)
        except DataLossError:
            raise self._loss(record) from None

    def close(self) -> None:
        """Release connections and scratch space. Look-ups still work; nothing else may be called."""
        self._catalogue.close()
        self._scratch.close()

    def _loss(self, record: AdapterRecord) -> AdapterError:
        """Why a version's bytes are missing: it was deleted by some process, or they are lost."""
        digests = {part.digest for part in record.parts}
        if self._catalogue.named(digests) == digests:
            return DataLossError(record.name, "its stored files are missing or damaged")
        return TaskNotFoundError(record.name, "was deleted")
