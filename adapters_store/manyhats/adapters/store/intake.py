"""The way in: from a source or an upload to a published version."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.disk.scratch import Scratch
from manyhats.adapters.errors import (
    AdapterError,
    ArgumentInvalidError,
    DigestMismatchError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreConfigError,
)
from manyhats.adapters.labels import check_labels
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.validation import (
    OpenedPart,
    ValidVersion,
    of_part,
    validate_composed,
    validate_plain,
)
from manyhats.adapters.lowering.version import part_name
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.sources.sources import AdapterSources
from manyhats.adapters.store.catalogue.answers import Registration, RegistrationBody, check_request_id
from manyhats.adapters.store.publication import Publisher
from manyhats.adapters.store.upload import UploadFile, UploadSession, announced_digest, check_files
from manyhats.adapters.taskid import check_task_id


@dataclass(frozen=True, slots=True)
class PartSource:
    """A part of a composed version: where it lies, and the weight that its deltas get."""

    uri: str
    weight: float = 1.0


class Intake:
    """Registers what lies somewhere, or is uploaded. Safe in any thread.

    Args:
        sources: opens what is registered.
        scratch: takes uploads.
        publisher: makes valid versions known.
        base: what adapters are checked against.
        limits: how large an adapter may be.
    """

    def __init__(
        self,
        sources: AdapterSources,
        scratch: Scratch,
        publisher: Publisher,
        base: BaseDescription | None,
        limits: AdapterLimits,
    ) -> None:
        self._sources = sources
        self._scratch = scratch
        self._publisher = publisher
        self._base = base
        self._limits = limits
        # One validation at a time bounds memory, and orders requests of one id. Nothing is downloaded under it.
        self._lock = threading.Lock()

    def register(
        self,
        uri: str,
        parts: Sequence[PartSource],
        body: RegistrationBody,
        probe: Probe | None,
        prepare: Prepare | None,
    ) -> Registration:
        """Register what lies at ``uri``, or at each of ``parts``; see ``AdapterStore.register``."""
        base = require_base(self._base)
        body = replace(body, sources=self._described(uri, parts))
        if (answered := self._publisher.recall(body)) is not None:
            return answered
        with contextlib.ExitStack() as opened:
            if parts:
                sources = self._open_parts(parts, opened)
                return self._publish(
                    lambda: validate_composed(sources, base, self._limits, assume_base=body.assume_base),
                    body,
                    "composed",
                    probe,
                    prepare,
                )
            directory = opened.enter_context(self._sources.open(uri))
            return self._publish(
                lambda: validate_plain(uri, directory, base, self._limits, assume_base=body.assume_base),
                body,
                uri,
                probe,
                prepare,
            )

    def open_upload(self, files: Sequence[UploadFile], body: RegistrationBody) -> UploadSession:
        """Begin to take files; see ``AdapterStore.open_upload``."""
        base = require_base(self._base)
        checked = check_files(files, self._limits)
        digest = announced_digest(checked)
        if body.expected_digest not in ("", digest):
            raise DigestMismatchError("expected_digest", f"the files announced have the digest {digest}")
        self._publisher.check_quotas(body.task_id, digest, sum(file.size_bytes for file in checked))
        body = replace(
            body, sources=tuple(("file", file.name, file.size_bytes, file.sha256) for file in checked)
        )

        def publish(
            directory: SourceDirectory, *, probe: Probe | None, prepare: Prepare | None
        ) -> Registration:
            return self._publish(
                lambda: validate_plain("upload", directory, base, self._limits, assume_base=body.assume_base),
                body,
                "upload",
                probe,
                prepare,
            )

        return UploadSession(checked, self._scratch.open(), publish)

    def _publish(
        self,
        validate: Callable[[], ValidVersion],
        body: RegistrationBody,
        source: str,
        probe: Probe | None,
        prepare: Prepare | None,
    ) -> Registration:
        with self._lock:
            if (answered := self._publisher.recall(body)) is not None:
                return answered
            return self._publisher.publish(validate(), body, source=source, probe=probe, prepare=prepare)

    def _described(self, uri: str, parts: Sequence[PartSource]) -> tuple[tuple[str | float, ...], ...]:
        if bool(uri) == bool(parts):
            raise ArgumentInvalidError("uri", "give exactly one of uri and parts")
        if len(parts) > self._limits.max_parts:
            raise ArgumentInvalidError(
                "parts", f"has {len(parts)} entries; the limit is {self._limits.max_parts}"
            )
        return tuple(("part", part.uri, float(part.weight)) for part in parts) or (("uri", uri),)

    def _open_parts(self, parts: Sequence[PartSource], opened: contextlib.ExitStack) -> list[OpenedPart]:
        sources = []
        for i, part in enumerate(parts):
            try:
                directory = opened.enter_context(self._sources.open(part.uri))
            except (SourceNotAllowedError, SourceNotFoundError, SourceUnavailableError) as error:
                raise type(error)(f"{part_name(i)}.uri", error.description) from error
            except AdapterError as error:
                raise of_part(i, error) from error
            sources.append(OpenedPart(part.uri, float(part.weight), directory))
        return sources


def checked_body(
    *,
    task_id: str,
    activate: bool,
    validate_only: bool,
    expected_digest: str,
    request_id: str,
    labels: Mapping[str, str],
    assume_base: bool,
) -> RegistrationBody:
    """What a registration asks for, checked; its sources are still to be said.

    Raises:
        ArgumentInvalidError: an argument is out of range.
    """
    check_task_id(task_id)
    check_request_id(request_id)
    return RegistrationBody(
        task_id=task_id,
        sources=(),
        activate=activate,
        validate_only=validate_only,
        expected_digest=expected_digest.strip().lower(),
        labels=check_labels(labels),
        request_id=request_id,
        assume_base=assume_base,
    )


def require_base(base: BaseDescription | None) -> BaseDescription:
    """The base that adapters are for.

    Raises:
        StoreConfigError: the store was opened without one.
    """
    if base is None:
        raise StoreConfigError("base", "the store was opened without a base model")
    return base
