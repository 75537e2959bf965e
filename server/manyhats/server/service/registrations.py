"""Changes the store, and keeps engine and metrics in step with it; lists what a token may see of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import structlog

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import AdapterError, StoreUnavailableError, TaskNotFoundError
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.probe import Prepare
from manyhats.adapters.registration import Registered, Registration
from manyhats.adapters.store.catalogue.pages import MAX_PAGE_SIZE, Page, encode_page_token, page_length
from manyhats.adapters.taskid import parse_name
from manyhats.engine.errors import EngineError
from manyhats.engine.threads.awaiting import outlived
from manyhats.server.access.tokens import Scope
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.backend import Backend
from manyhats.server.service.reasons import reason_of
from manyhats.server.service.store_health import StoreUse
from manyhats.server.service.task_defaults import read_defaults

if TYPE_CHECKING:
    from manyhats.adapters.store.store import AdapterStore
    from manyhats.adapters.store.upload import UploadSession

# How long the switch to a new version waits for it to load.
_WARM_LIMIT_S = 30.0
_log = structlog.get_logger("manyhats.adapters")

P = ParamSpec("P")
T = TypeVar("T")


def _carried_through(change: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Makes a change run to its end once begun, including engine and metrics, even if its caller leaves."""

    @wraps(change)
    async def begun(*args: P.args, **kwargs: P.kwargs) -> T:
        return await outlived(change(*args, **kwargs))

    return begun


class Registrations:
    """Registers, activates, pins and deletes; the store's blocking work runs in worker threads.

    Args:
        backend: its store and engine.
        metrics: counts.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._health = backend.store_health
        self._metrics = metrics

    @_carried_through
    async def register(self, registration: Registration) -> Registered:
        """Make an artifact a version of a task. It is loaded before it goes live, so its first request need not wait.

        Raises:
            AdapterError: it was refused.
        """
        store, engine, prepare = self._backend.store, self._backend.engine, self._prepare()
        with self.counted_failures():
            read_defaults(registration.labels)
        return await self._published(
            registration, lambda: store.register(registration, probe=engine.probe, prepare=prepare)
        )

    async def open_upload(self, registration: Registration) -> UploadSession:
        """Begin an upload; the session must be aborted or finished.

        Raises:
            AdapterError: it would be refused in any case.
        """
        store = self._backend.store
        read_defaults(registration.labels)
        opening = self._begun(lambda: store.open_upload(registration))
        try:
            return await self._health.unless_hanging(opening, *StoreUse)
        except StoreUnavailableError:
            opening.add_done_callback(self._abort_late)
            raise

    def _abort_late(self, opening: asyncio.Future[UploadSession]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._begun(opening.result().abort, even_if_hanging=True)

    async def abort_upload(self, session: UploadSession) -> None:
        """Remove what has arrived: now, or once the store no longer hangs."""
        aborting = self._begun(session.abort, even_if_hanging=True)
        with suppress(StoreUnavailableError):
            await self._health.unless_hanging(aborting, *StoreUse)

    @_carried_through
    async def finish_upload(self, session: UploadSession, registration: Registration) -> Registered:
        """``register`` what has arrived.

        Raises:
            AdapterError: it was refused.
        """
        engine, prepare = self._backend.engine, self._prepare()
        return await self._published(
            registration, lambda: session.finish(probe=engine.probe, prepare=prepare)
        )

    @_carried_through
    async def activate(self, name: str) -> AdapterRecord:
        """Move a task to the version ``task@3``, which is loaded before the switch.

        Raises:
            AdapterError: there is no such version, or it cannot be served.
        """
        store = self._backend.store
        if parse_name(name).version is not None:
            await self._load(store.get(name))
        record = await self.run(lambda: store.activate(name))
        self.count(record.task_id)
        await self.follow_pins({record.task_id})
        return record

    @_carried_through
    async def pin(self, name: str) -> AdapterRecord:
        """Keep in memory the version ``task@3``, or whichever is active of ``task``; it is loaded first.

        Raises:
            AdapterError: there is no such version, or it cannot be served.
            EngineError: there is no room for it.
        """
        store = self._backend.store
        await self._backend.engine.pin_adapter(store.get(name))
        try:
            record = await self.run(lambda: store.set_pin(name, is_pinned=True))
        finally:
            await self.follow_pins({parse_name(name).task_id})
        self.count(record.task_id)
        return record

    @_carried_through
    async def unpin(self, name: str) -> AdapterRecord:
        """Let a version make room for others again, or all of a task's.

        Raises:
            AdapterError: there is no such version.
        """
        store = self._backend.store
        record = await self.run(lambda: store.set_pin(name, is_pinned=False))
        await self.follow_pins({record.task_id})
        self.count(record.task_id)
        return record

    async def follow_pins(self, tasks: Collection[str] | None = None) -> None:
        """Keep in memory what the store says is to stay there, as far as there is room, and nothing else.

        Args:
            tasks: only of these anything is loaded; None for all.
        """
        for record in self._unpin_others():
            if tasks is not None and record.task_id not in tasks:
                continue
            try:
                await self._backend.engine.pin_adapter(record)
            except Exception as error:  # noqa: BLE001 - whatever fails there, it is tried again, and others go on
                bug = None if isinstance(error, AdapterError | EngineError) else error
                _log.warning(
                    "pinned adapter not in memory", adapter=record.name, error=str(error), exc_info=bug
                )
                if isinstance(error, StoreUnavailableError):
                    return
            self._unpin_others()  # it may have been unpinned meanwhile

    def _unpin_others(self) -> list[AdapterRecord]:
        """Unpin in the engine what is not pinned in the store; returns what is only pinned there."""
        engine = self._backend.engine
        wanted = self._backend.store.pinned()
        pinned = engine.pinned_digests()
        for digest in pinned - {record.digest for record in wanted}:
            engine.unpin_adapter(digest)
        return [record for record in wanted if record.digest not in pinned]

    @_carried_through
    async def delete(self, name: str, *, force: bool) -> tuple[AdapterRecord, ...]:
        """Delete a version or a whole task; memory is freed once no request uses it.

        Raises:
            AdapterError: there is no such version, or it is in use and ``force`` is false.
        """
        store, engine = self._backend.store, self._backend.engine
        gone = await self.run(lambda: store.delete(name, in_use=engine.in_use, force=force))
        self.forget_unneeded()
        tasks = {record.task_id for record in gone}
        for task_id in tasks:
            self.count(task_id)
        await self.follow_pins(tasks)
        return gone

    async def warm(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        """Load an adapter before its first request, from the store if necessary; nothing depends on it."""
        try:
            await self._backend.engine.warm_adapter(record, lowered)
        except (AdapterError, EngineError) as error:
            _log.warning(
                "adapter not loaded yet", task=record.task_id, digest=record.digest, error=str(error)
            )

    def forget_unneeded(self) -> None:
        """Free the memory of adapters that no version in the store uses."""
        store, engine = self._backend.store, self._backend.engine
        for digest in engine.resident_digests():
            if not store.has_digest(digest):
                engine.forget_adapter(digest)

    def count(self, task_id: str) -> None:
        """Report a task's versions to the metrics, or that it is gone."""
        self._metrics.task_changed(task_id, self.versions(task_id))

    def count_all(self) -> None:
        """Report everything in the store to the metrics, page by page."""
        by_task: defaultdict[str, list[AdapterRecord]] = defaultdict(list)
        token = ""
        while True:
            page = self._backend.store.list(page_size=1000, page_token=token)
            for record in page.records:
                by_task[record.task_id].append(record)
            token = page.next_page_token
            if not token:
                break
        for task_id, records in by_task.items():
            self._metrics.task_changed(task_id, records)

    def versions(self, task_id: str) -> tuple[AdapterRecord, ...]:
        """A task's versions; none if it is gone."""
        try:
            return tuple(self._backend.store.versions(task_id))
        except TaskNotFoundError:
            return ()

    async def run(self, work: Callable[[], T]) -> T:
        """Run work that blocks on the store in a worker thread.

        Raises:
            StoreUnavailableError: the store hangs. What has begun may still be done, once it no longer does.
        """
        working = self._begun(work)
        try:
            return await self._health.unless_hanging(working, *StoreUse)
        except BaseException:
            working.cancel()  # unless it has begun
            raise

    def _begun(self, work: Callable[[], T], *, even_if_hanging: bool = False) -> asyncio.Future[T]:
        if not even_if_hanging:
            self._health.check(*StoreUse)

        def counted() -> T:
            with self._health.working():
                return work()

        return asyncio.get_running_loop().run_in_executor(self._backend.store_threads, counted)

    @contextmanager
    def counted_failures(self) -> Iterator[None]:
        """Count a registration that ends in this block, before it is answered."""
        try:
            yield
        except asyncio.CancelledError:
            self._metrics.registration("abandoned")
            raise
        except Exception as error:
            self._metrics.registration("refused", reason_of(error).word)
            raise

    async def _published(self, registration: Registration, publish: Callable[[], Registered]) -> Registered:
        with self.counted_failures():
            try:
                registered = await self.run(publish)
            except Exception:
                self.forget_unneeded()  # it may have been loaded for nothing
                raise
        if registration.validate_only:
            self._metrics.registration("validated")
            return registered
        self._metrics.registration("created" if registered.created else "existing")
        self.count(registration.task_id)
        await self.follow_pins({registration.task_id})
        return registered

    def _prepare(self) -> Prepare:
        """Load, for the store's thread, a version that is about to go live."""
        loop = asyncio.get_running_loop()

        def prepare(record: AdapterRecord, lowered: LoweredAdapter) -> None:
            try:
                asyncio.run_coroutine_threadsafe(self.warm(record, lowered), loop).result(_WARM_LIMIT_S)
            except TimeoutError:
                _log.warning("adapter not loaded yet", task=record.task_id, digest=record.digest)

        return prepare

    async def _load(self, record: AdapterRecord) -> None:
        """Load a version; if there is no room for it now, it still becomes the active one."""
        try:
            await self._backend.engine.warm_adapter(record)
        except EngineError as error:
            _log.warning(
                "adapter not loaded yet", task=record.task_id, digest=record.digest, error=str(error)
            )


def visible_page(store: AdapterStore, scope: Scope, *, task_id: str, page_size: int, page_token: str) -> Page:
    """``store.list``, restricted to the scope; its page token reveals nothing outside it either.

    Raises:
        ArgumentInvalidError: an argument is out of range.
    """
    if scope.is_everything:
        return store.list(task_id=task_id, page_size=page_size, page_token=page_token)
    size = page_length(page_size)
    found: list[AdapterRecord] = []
    for record in _records(store, task_id, page_token):
        if not scope.reaches(record.task_id):
            continue
        if len(found) == size:
            return Page(tuple(found), encode_page_token(task_id, found[-1].task_id, found[-1].version))
        found.append(record)
    return Page(tuple(found), "")


def active_records(store: AdapterStore, scope: Scope) -> Iterator[AdapterRecord]:
    """The active version of each task that the scope covers."""
    for record in _records(store, "", ""):
        if record.state is AdapterState.ACTIVE and scope.reaches(record.task_id):
            yield record


def _records(store: AdapterStore, task_id: str, page_token: str) -> Iterator[AdapterRecord]:
    """All records after a token."""
    while True:
        page = store.list(task_id=task_id, page_size=MAX_PAGE_SIZE, page_token=page_token)
        yield from page.records
        page_token = page.next_page_token
        if not page_token:
            return
