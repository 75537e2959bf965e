"""The adapter store: registers, lists, resolves, loads and deletes the versions of tasks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from manyhats.adapters.answered_requests import (
    AnsweredRequests,
    Registration,
    RegistrationBody,
    check_request_id,
)
from manyhats.adapters.artifact import AdapterArtifact, AdapterRecord, AdapterState
from manyhats.adapters.artifact_files import ArtifactFiles
from manyhats.adapters.catalogue import Catalogue
from manyhats.adapters.digest import artifact_digest
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInUseError,
    ArgumentInvalidError,
    DataLossError,
    DigestMismatchError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from manyhats.adapters.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.page_token import decode_page_token, encode_page_token
from manyhats.adapters.reader import ReadAdapter, parse_artifact, read_adapter
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.taskid import check_task_id, parse_name

__all__ = ["AdapterStore", "Page", "Registration"]

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_MAX_LABELS = 64
_MAX_LABEL_LENGTH = 256
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; an empty ``next_page_token`` says that it is the last."""

    records: tuple[AdapterRecord, ...]
    next_page_token: str


class AdapterStore:
    """Versions of tasks: immutable files under ``root``, a catalogue in memory. Safe in any thread.

    Args:
        root: the store's own directory; made if it is missing. What lies there uncatalogued is removed.
        base: the resident base, which every adapter is checked against.
        allowed_roots: the directories that sources may lie under.
        limits: how large an adapter may be.
        catalogue: an empty one in memory by default.

    Raises:
        StoreError: ``root`` cannot be written.
    """

    def __init__(
        self,
        root: Path,
        base: BaseDescription,
        allowed_roots: Sequence[Path],
        limits: AdapterLimits | None = None,
        *,
        catalogue: Catalogue | None = None,
    ) -> None:
        self._base = base
        self._limits = limits or AdapterLimits()
        self._allowed_roots = tuple(Path(os.path.realpath(allowed)) for allowed in allowed_roots)
        self._catalogue = catalogue or Catalogue()
        self._files = ArtifactFiles(Path(os.path.realpath(root)), self._limits)
        self._files.sweep(keep=self._catalogue.digests())
        # One registration at a time bounds memory, and orders requests of one id.
        self._register_lock = threading.Lock()
        # Held while files and catalogue change together.
        self._publish_lock = threading.Lock()
        self._answered = AnsweredRequests()

    def register(
        self,
        task_id: str,
        uri: str,
        *,
        activate: bool = True,
        validate_only: bool = False,
        expected_digest: str = "",
        request_id: str = "",
        labels: Mapping[str, str] = _NO_LABELS,
    ) -> Registration:
        """Validate the adapter at ``uri`` and publish a copy of it as a version of the task.

        The same bytes again are the version that exists, activated if asked. The same ``request_id`` and
        content again is the first answer. With ``validate_only`` nothing is stored: a record of version 0
        says what would be.

        Raises:
            ArgumentInvalidError: task id, labels or request id are out of range.
            RequestIdReusedError: the request id was used for something else.
            SourceNotAllowedError, SourceNotFoundError: ``uri`` is not a directory under an allowed root.
            ArtifactError, BaseMismatchError: the adapter cannot be served on this base.
            DigestMismatchError: it is not the expected one.
            StoreError: it could not be written.
        """
        check_task_id(task_id)
        check_request_id(request_id)
        body = RegistrationBody(
            task_id=task_id,
            uri=uri,
            activate=activate,
            validate_only=validate_only,
            expected_digest=expected_digest,
            labels=_check_labels(labels),
        )
        with self._register_lock:
            if (answered := self._answered.recall(request_id, body)) is not None:
                return answered
            registration = self._register(body)
            self._answered.remember(request_id, body, registration)
        return registration

    def get(self, name: str) -> AdapterRecord:
        """The version that ``task`` (its active one) or ``task@3`` names.

        Raises:
            TaskIdInvalidError, TaskNotFoundError, NoActiveVersionError: it names none.
        """
        return self._catalogue.resolve(parse_name(name))

    def resolve(self, name: str) -> AdapterRecord:
        """The version that a request for ``name`` runs on; a look-up in memory, for every request.

        Raises:
            TaskIdInvalidError, TaskNotFoundError, NoActiveVersionError: it names none.
        """
        return self._catalogue.resolve(parse_name(name))

    def versions(self, task_id: str) -> tuple[AdapterRecord, ...]:
        """All versions of a task, oldest first.

        Raises:
            TaskIdInvalidError, TaskNotFoundError: there is no such task.
        """
        return self._catalogue.versions(check_task_id(task_id))

    def activate(self, name: str) -> AdapterRecord:
        """Make ``task@3`` the version that ``task`` means.

        Raises:
            TaskIdInvalidError, TaskNotFoundError: there is no such version, or the name gives none.
        """
        parsed = parse_name(name)
        if parsed.version is None:
            raise ArgumentInvalidError("task_id", "must name the version to activate, as in 'task@3'")
        return self._catalogue.activate(parsed.task_id, parsed.version)

    def list(self, *, task_id: str = "", page_size: int = 0, page_token: str = "") -> Page:
        """Versions ordered by task id and version.

        Args:
            task_id: of this task alone; empty for all. A task that does not exist has an empty list.
            page_size: at most this many (1000 at most); 0 for 100.
            page_token: from the page before, of a list with the same ``task_id``.

        Raises:
            ArgumentInvalidError: an argument is out of range.
        """
        if task_id:
            check_task_id(task_id)
        if page_size < 0:
            raise ArgumentInvalidError("page_size", "must not be negative")
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        after = decode_page_token(page_token, task_id)
        # One more than asked for tells whether another page follows.
        records = self._catalogue.page(task_id=task_id, after=after, max_records=size + 1)
        page = tuple(records[:size])
        more = len(records) > size
        return Page(page, encode_page_token(task_id, page[-1].task_id, page[-1].version) if more else "")

    def delete(
        self, name: str, *, in_use: Callable[[AdapterRecord], bool], force: bool = False
    ) -> tuple[AdapterRecord, ...]:
        """Remove one version (``task@3``) or all (``task``), and the files that no version needs any more.

        Args:
            name: what to remove.
            in_use: whether requests run on a version. It is called while nobody can resolve one, so it must
                be quick.
            force: remove it even so; who has loaded it already keeps it.

        Returns:
            What was removed.

        Raises:
            TaskIdInvalidError, TaskNotFoundError: there is nothing of that name.
            AdapterInUseError: it is in use and ``force`` is not given; nothing is removed then.
        """
        parsed = parse_name(name)

        def refuse_in_use(records: Sequence[AdapterRecord]) -> None:
            used = next((record for record in records if not force and in_use(record)), None)
            if used is not None:
                raise AdapterInUseError(
                    used.name, "requests are running on it; force its deletion, or try again later"
                )

        with self._publish_lock:
            removed = self._catalogue.remove(parsed, refuse_in_use)
            for digest in {record.digest for record in removed}:
                if not self._catalogue.has_digest(digest):
                    self._files.remove(digest)
        return removed

    def load(self, record: AdapterRecord) -> AdapterArtifact:
        """Read a version's stored files into memory.

        Raises:
            TaskNotFoundError: it was deleted meanwhile.
            DataLossError: its files are not those that were registered.
            StoreUnavailableError: the disk fails.
        """
        try:
            files = self._files.read(record.digest)
        except StoreUnavailableError:
            raise
        except AdapterError:
            self._require_catalogued(record)
            raise DataLossError(record.name, "its stored files are missing or unreadable") from None
        if artifact_digest(files) != record.digest:
            raise DataLossError(
                record.name, "its stored files do not have the digest they were registered with"
            )
        return parse_artifact(files, record.digest, self._limits)

    def _require_catalogued(self, record: AdapterRecord) -> None:
        if not self._catalogue.has_digest(record.digest):
            raise TaskNotFoundError(record.name, "was deleted")

    def _register(self, body: RegistrationBody) -> Registration:
        with open_source(body.uri, self._allowed_roots) as directory:
            read = read_adapter(directory, self._base, self._limits)
        _check_digest(read.artifact.digest, body.expected_digest)
        draft = self._draft(body, read)
        if body.validate_only:
            existing = self._catalogue.find_digest(draft.task_id, draft.digest)
            return Registration(existing or draft, created=False)
        return self._publish(draft, read, activate=body.activate)

    def _draft(self, body: RegistrationBody, read: ReadAdapter) -> AdapterRecord:
        """The record as it will be, but for version and state."""
        artifact = read.artifact
        return AdapterRecord(
            task_id=body.task_id,
            version=0,
            digest=artifact.digest,
            method=artifact.method,
            state=AdapterState.CREATING,
            path=self._files.path(artifact.digest),
            size_bytes=artifact.size_bytes,
            num_parameters=artifact.num_parameters,
            source=body.uri,
            create_time=datetime.now(UTC),
            base_model=artifact.base_model,
            labels=body.labels,
            notes=read.notes,
        )

    def _publish(self, draft: AdapterRecord, read: ReadAdapter, *, activate: bool) -> Registration:
        with self._publish_lock:
            self._files.publish(draft.digest, read.files)
            existing = self._catalogue.find_digest(draft.task_id, draft.digest)
            if existing is None:
                return Registration(self._catalogue.add(draft, activate=activate), created=True)
            if activate:
                existing = self._catalogue.activate(existing.task_id, existing.version)
            return Registration(existing, created=False)


def _check_digest(digest: str, expected: str) -> None:
    if expected and digest != expected.strip().lower():
        raise DigestMismatchError("expected_digest", f"the adapter's digest is {digest}")


def _check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """A copy that nobody else can change."""
    if len(labels) > _MAX_LABELS:
        raise ArgumentInvalidError("labels", f"has {len(labels)} entries; the limit is {_MAX_LABELS}")
    for key, value in labels.items():
        if not key or max(len(key), len(value)) > _MAX_LABEL_LENGTH or not (key + value).isprintable():
            raise ArgumentInvalidError(
                "labels",
                f"keys have 1 to {_MAX_LABEL_LENGTH} printable characters, values at most as many",
            )
    return MappingProxyType(dict(labels))
