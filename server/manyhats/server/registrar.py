"""Registers and deletes adapters, and keeps store, engine and metrics in step."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import structlog

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterError, TaskNotFoundError
from manyhats.engine.errors import EngineError
from manyhats.server.metrics import Metrics
from manyhats.server.ports import Backend, Registration
from manyhats.server.status import case_of

_log = structlog.get_logger("manyhats.adapters")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationSpec:
    """What to register, and how; the fields are those of ``RegisterAdapterRequest``."""

    task_id: str
    uri: str
    activate: bool = True
    validate_only: bool = False
    expected_digest: str = ""
    request_id: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Registrar:
    """Changes the catalogue; the store's blocking work runs in worker threads."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics

    async def register(self, spec: RegistrationSpec) -> Registration:
        """Make an artifact a version of a task, and load it so that its first request need not wait.

        Raises:
            AdapterError: it was refused.
        """
        try:
            registration = await asyncio.to_thread(self._register, spec)
        except Exception as error:
            self._metrics.registration("refused", case_of(error).reason)
            raise
        if spec.validate_only:
            self._metrics.registration("validated")
            return registration
        self._metrics.registration("created" if registration.created else "existing")
        self._count(spec.task_id)
        if spec.activate:
            await self._warm(registration.record)
        return registration

    async def delete(self, name: str, *, force: bool) -> tuple[AdapterRecord, ...]:
        """Delete a version or a whole task; memory is freed once no request uses it.

        Raises:
            AdapterError: there is no such version, or it is in use and ``force`` is false.
        """
        engine = self._backend.engine
        gone = await asyncio.to_thread(
            self._backend.store.delete, name, in_use=lambda record: engine.in_use(record.digest), force=force
        )
        for record in gone:
            engine.forget_adapter(record.digest)
        for task_id in {record.task_id for record in gone}:
            self._count(task_id)
        return gone

    def count_all(self) -> None:
        """Tell the metrics of everything in the store, page by page."""
        store, token, task_ids = self._backend.store, "", set[str]()
        while True:
            page = store.list(page_size=1000, page_token=token)
            task_ids.update(record.task_id for record in page.records)
            token = page.next_page_token
            if not token:
                break
        for task_id in sorted(task_ids):
            self._count(task_id)

    def _register(self, spec: RegistrationSpec) -> Registration:
        return self._backend.store.register(
            spec.task_id,
            spec.uri,
            activate=spec.activate,
            validate_only=spec.validate_only,
            expected_digest=spec.expected_digest,
            request_id=spec.request_id,
            labels=spec.labels,
        )

    async def _warm(self, record: AdapterRecord) -> None:
        """Load an adapter ahead of its first request; that it is registered does not depend on it."""
        try:
            await self._backend.engine.warm_adapter(record)
        except (AdapterError, EngineError) as error:
            _log.warning("adapter not loaded yet", adapter=record.name, error=str(error))

    def _count(self, task_id: str) -> None:
        try:
            records = self._backend.store.versions(task_id)
        except TaskNotFoundError:
            records = ()
        self._metrics.task_changed(task_id, records)
