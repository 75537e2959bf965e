"""Registering: from a source or an upload to a published version."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace

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
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import part_name
from manyhats.adapters.lowering.validation import of_part, validate
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import (
    Files,
    Parts,
    Registered,
    Registration,
    Unannounced,
    UploadFile,
    Uri,
)
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.sources.sources import AdapterSources
from manyhats.adapters.store.publication import Publisher
from manyhats.adapters.store.upload import UploadSession, announced_digest, check_files


class Registering:
    """Registers from a source or an upload. Thread-safe.

    Args:
        sources: opens what is registered.
        scratch: takes uploads.
        publisher: publishes valid versions.
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
        # One validation at a time bounds memory, and orders requests with the same id. Nothing is downloaded under it.
        self._lock = threading.Lock()

    def register(
        self, registration: Registration, probe: Probe | None, prepare: Prepare | None
    ) -> Registered:
        """Register from a source; see ``AdapterStore.register``."""
        base = require_base(self._base)
        if isinstance(registration.source, Files | Unannounced):
            raise ArgumentInvalidError("files", "must be sent in an upload")
        self._check_count(registration.source)
        if (answered := self._publisher.recall(registration)) is not None:
            return answered
        with contextlib.ExitStack() as opened:
            directories = self._open(registration.source, opened)
            return self._publish(registration, directories, base, probe, prepare)

    def open_upload(self, registration: Registration) -> UploadSession:
        """Begin an upload; see ``AdapterStore.open_upload``."""
        base, source = require_base(self._base), registration.source
        if isinstance(source, Uri | Parts):
            raise ArgumentInvalidError("files", "must be announced for an upload")
        announced = source.files if isinstance(source, Files) else ()
        if isinstance(source, Files):
            self._check_files(registration, announced)

        def publish(
            directory: SourceDirectory,
            files: Sequence[UploadFile],
            probe: Probe | None,
            prepare: Prepare | None,
        ) -> Registered:
            if isinstance(source, Unannounced):
                self._check_files(registration, files)
            arrived = replace(registration, source=Files(files))
            return self._publish(arrived, [directory], base, probe, prepare)

        limits = self._limits if isinstance(source, Unannounced) else None
        return UploadSession(announced, self._scratch.open(), publish, limits)

    def _check_files(self, registration: Registration, files: Sequence[UploadFile]) -> None:
        """Check whatever can be told of files without reading them."""
        check_files(files, self._limits)
        digest = announced_digest(files)
        if registration.expected_digest not in ("", digest):
            raise DigestMismatchError("expected_digest", f"the files have the digest {digest}")
        self._publisher.check_quotas(registration.task_id, digest, sum(file.size_bytes for file in files))

    def _publish(
        self,
        registration: Registration,
        directories: Sequence[SourceDirectory],
        base: BaseDescription,
        probe: Probe | None,
        prepare: Prepare | None,
    ) -> Registered:
        with self._lock:
            if (answered := self._publisher.recall(registration)) is not None:
                return answered
            valid = validate(registration, directories, base, self._limits)
            return self._publisher.publish(valid, registration, probe=probe, prepare=prepare)

    def _check_count(self, source: Uri | Parts) -> None:
        if isinstance(source, Parts) and len(source.parts) > self._limits.max_parts:
            raise ArgumentInvalidError(
                "parts", f"has {len(source.parts)} entries; the limit is {self._limits.max_parts}"
            )

    def _open(self, source: Uri | Parts, opened: contextlib.ExitStack) -> list[SourceDirectory]:
        """Open what a source names, one directory for each part."""
        if isinstance(source, Uri):
            return [opened.enter_context(self._sources.open(source.uri))]
        directories = []
        for i, part in enumerate(source.parts):
            try:
                directories.append(opened.enter_context(self._sources.open(part.uri)))
            except (SourceNotAllowedError, SourceNotFoundError, SourceUnavailableError) as error:
                raise type(error)(f"{part_name(i)}.uri", error.description) from error
            except AdapterError as error:
                raise of_part(i, error) from error
        return directories


def require_base(base: BaseDescription | None) -> BaseDescription:
    """The base that adapters are made for.

    Raises:
        StoreConfigError: the store was opened without one.
    """
    if base is None:
        raise StoreConfigError("base", "the store was opened without a base model")
    return base
