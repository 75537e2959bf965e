"""The catalogue: which versions a task has and which one is active. Durable tables behind an index in memory.

The tables are authoritative, and several processes share them. The index answers requests without any I/O. A write by
this process is in the index when it returns, one by another process after ``refresh``.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

from sqlalchemy import Connection, distinct, func, select

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import QuotaExceededError
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Registered, Registration
from manyhats.adapters.store.catalogue.database import IN_MEMORY, CatalogueDatabase, WriteTransaction
from manyhats.adapters.store.catalogue.index import CatalogueIndex
from manyhats.adapters.store.catalogue.rows import (
    read_answer,
    read_changed_tasks,
    read_generation,
    read_named_digests,
    read_task,
    write_answer,
    write_task,
)
from manyhats.adapters.store.catalogue.tables import VERSIONS
from manyhats.adapters.store.catalogue.task import CataloguedTask
from manyhats.adapters.taskid import TaskName

__all__ = ["IN_MEMORY", "Catalogue"]


class Catalogue:
    """Tasks, versions and states. Every method is atomic and thread-safe.

    ``resolve``, ``versions``, ``find_digest``, ``has_digest``, ``pinned`` and ``page`` only read memory. The others
    wait for the database. If it fails they raise ``StoreUnavailableError``, or ``StoreFullError`` if its disk is full;
    nothing has changed then, and look-ups still answer what was known.

    Args:
        url: ``sqlite:////directory/catalogue.db`` in an existing directory,
            ``postgresql+psycopg://user@host/database``, or ``IN_MEMORY``.
        create: create missing tables; otherwise they are an error.

    Raises:
        StoreConfigError: the URL is not one of these, or its tables are of another version of this software.
        StoreMissingError: it has none, and none are to be created.
        StoreUnavailableError: the database cannot be reached.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._database = CatalogueDatabase(url, create=create)
        self._index = CatalogueIndex()
        # This process changes the index in the order in which it reads the tables.
        self._lock = threading.Lock()
        self._seen_generation = self._num_replaced = 0
        try:
            with _without_collection():
                self.refresh()
        except BaseException:
            self.close()
            raise

    @property
    def catalogue_id(self) -> str:
        """Identifies these tables; random, made with them."""
        return self._database.catalogue_id

    def check_writes(self) -> None:
        """Check that the tables can be written, without changing them.

        Raises:
            StoreError: they cannot.
        """
        self._database.check_writes()

    def clock_difference_s(self) -> float | None:
        """Seconds that the database server's clock is ahead of this machine's; None if there is no server."""
        return self._database.clock_difference_s()

    def resolve(self, name: TaskName) -> AdapterRecord:
        """The version a name refers to: the one it gives, or the active one.

        Raises:
            TaskNotFoundError: no such task or version.
            NoActiveVersionError: the name gives no version and none is active.
        """
        return self._index.resolve(name)

    def versions(self, task_id: str) -> tuple[AdapterRecord, ...]:
        """All versions of a task, oldest first.

        Raises:
            TaskNotFoundError: no such task.
        """
        return self._index.task(task_id).require_versions()

    def find_digest(self, task_id: str, digest: str) -> AdapterRecord | None:
        """The version of a task that has a digest."""
        return self._index.task(task_id).find_digest(digest)

    def has_digest(self, digest: str) -> bool:
        """Whether any version of any task has a digest."""
        return self._index.has_digest(digest)

    def task_ids(self) -> frozenset[str]:
        """The tasks that have a version."""
        return self._index.task_ids()

    def pinned(self) -> list[AdapterRecord]:
        """The versions that are to stay in memory."""
        return self._index.pinned()

    def page(self, *, task_id: str, after: tuple[str, int], max_records: int) -> list[AdapterRecord]:
        """Up to ``max_records`` versions after ``after`` (task id, version); of one task, or of all ("")."""
        return self._index.page(task_id=task_id, after=after, max_records=max_records)

    def recall(self, registration: Registration) -> Registered | None:
        """The answer given to its request id by any process; None if the id is new.

        Raises:
            RequestIdReusedError: it was used for something else.
        """
        if not registration.request_id:
            return None
        with self._database.read() as connection:
            return read_answer(connection, registration)

    def remember(self, registration: Registration, answer: Registered) -> Registered:
        """Keep the answer to a call that changed nothing; returns the first answer to its request id.

        Raises:
            RequestIdReusedError: it was used for something else.
        """
        if not registration.request_id:
            return answer
        with self._database.write() as transaction:
            if (answered := read_answer(transaction.connection, registration)) is not None:
                return answered
            write_answer(transaction, registration, answer)
            return answer

    def add(self, record: AdapterRecord, registration: Registration, quotas: Quotas) -> Registered:
        """Register a version whose artifacts are stored.

        If its request id was answered, nothing happens. If the task has a version with this digest, that one is used:
        it no longer counts as failed, and is activated if requested. Otherwise a version is added.

        Args:
            record: what to add; its version and state are ignored.
            registration: what the caller requested.
            quotas: must still hold with one more version.

        Returns:
            The first answer to its request id, which later calls with that id also get.

        Raises:
            RequestIdReusedError: the request id was used for something else.
            QuotaExceededError: a quota does not allow one more version.
        """
        with self._changing(record.task_id) as change:
            connection = change.transaction.connection
            if (answered := read_answer(connection, registration)) is not None:
                return answered
            existing = change.task.find_digest(record.digest)
            if existing is None:
                check_quotas(connection, change.task, record.size_bytes, quotas)
                task = change.task.added(record)
            else:
                task = change.task.reregistered(existing.version, record)
            version = task.last_version if existing is None else existing.version
            task = task.activated(version) if registration.activate else task
            change.to(task)
            answer = Registered(task.versions[version], created=existing is None)
            write_answer(change.transaction, registration, answer)
            return answer

    def check_quotas(self, task_id: str, size_bytes: int, quotas: Quotas) -> None:
        """Refuse early what ``add`` would refuse now: one more version of a task, with this size.

        Raises:
            QuotaExceededError: a quota does not allow it.
        """
        with self._database.read() as connection:
            check_quotas(connection, read_task(connection, task_id), size_bytes, quotas)

    def activate(self, task_id: str, version: int) -> AdapterRecord:
        """Make a version the one its task's name refers to.

        Raises:
            TaskNotFoundError: there is no such version.
            DataLossError: it has failed.
        """
        with self._changing(task_id) as change:
            change.to(change.task.activated(version))
            return change.task.versions[version]

    def set_pin(self, name: TaskName, *, is_pinned: bool) -> AdapterRecord:
        """Keep in memory what a name refers to, now and later, or no longer; see ``CataloguedTask``.

        Returns:
            The version that it refers to now.

        Raises:
            TaskNotFoundError, NoActiveVersionError: it refers to no version.
        """
        with self._changing(name.task_id) as change:
            change.to(change.task.pinned(name) if is_pinned else change.task.unpinned(name))
            return change.task.find(name)

    def set_failure(self, task_id: str, version: int, reason: str) -> AdapterRecord:
        """Record why a version cannot be served; or, with an empty reason, that it can.

        If its task's name refers to it, that stays so, so that requests are refused for the right reason.

        Raises:
            TaskNotFoundError: there is no such version.
        """
        with self._changing(task_id) as change:
            change.to(change.task.with_failure(version, reason))
            return change.task.versions[version]

    def remove(
        self, name: TaskName, check: Callable[[Sequence[AdapterRecord]], None]
    ) -> tuple[AdapterRecord, ...]:
        """Remove a version, or all versions of a task.

        Args:
            name: with a version, only that one; without, all.
            check: called with what would be removed, while nobody in this process can resolve it; raises to keep it. It
                must be quick, and may look things up here but not write.

        Returns:
            What was removed.

        Raises:
            TaskNotFoundError: no such task or version.
        """
        with self._changing(name.task_id) as change:
            task = change.task
            gone = task.require_versions() if name.version is None else (task.find(name),)
            change.to(task.without({record.version for record in gone}))
            self._index.put(change.task, lambda: check(gone))
            return gone

    def refresh(self) -> frozenset[str]:
        """Read what was written since the last call.

        Returns:
            The tasks that changed, by any process.
        """
        with self._lock:
            with self._database.read() as connection:
                generation = read_generation(connection)
                is_same = self._database.num_replaced == self._num_replaced
                if is_same and generation == self._seen_generation:
                    return frozenset()
                changed = read_changed_tasks(connection, self._seen_generation if is_same else 0)
            if not is_same:  # by an older copy, perhaps
                found = {task.task_id for task in changed}
                changed += [CataloguedTask(task_id=task_id) for task_id in self._index.task_ids() - found]
            for task in changed:
                self._index.put(task)
            self._seen_generation, self._num_replaced = generation, self._database.num_replaced
            return frozenset(task.task_id for task in changed)

    def generation(self) -> int:
        """How many writes the database has seen; cheap enough to poll for changes."""
        with self._database.read() as connection:
            return read_generation(connection)

    def named(self, digests: Collection[str]) -> frozenset[str]:
        """Those digests whose artifact is part of some version in the database, by any process."""
        with self._database.read() as connection:
            return read_named_digests(connection, digests)

    def close(self) -> None:
        """Close the database connections; look-ups still work."""
        self._database.close()

    @contextlib.contextmanager
    def _changing(self, task_id: str) -> Iterator[_Change]:
        """One transaction on one task; once committed, its result is in the index."""
        with self._lock:
            known = self._index.task(task_id)
            try:
                with self._database.write() as transaction:
                    change = _Change(transaction, read_task(transaction.connection, task_id))
                    yield change
            except BaseException:
                self._index.put(known)  # an uncommitted removal has hidden versions
                raise
            self._index.put(change.task)


class _Change:
    """One task in a transaction."""

    def __init__(self, transaction: WriteTransaction, task: CataloguedTask) -> None:
        self.transaction = transaction
        self.task = task

    def to(self, task: CataloguedTask) -> None:
        """Write the task's new state."""
        self.task = write_task(self.transaction, self.task, task)


def check_quotas(connection: Connection, task: CataloguedTask, size_bytes: int, quotas: Quotas) -> None:
    """Accept one more version of a task.

    Args:
        connection: in a transaction that no other writer interferes with.
        task: its current state.
        size_bytes: the size of the version to add.
        quotas: must still hold afterwards.

    Raises:
        QuotaExceededError: a quota would be exceeded; ``subject`` is the first one.
    """
    for name, limit, would_be in _needs(connection, task, size_bytes, quotas):
        if would_be > limit:
            raise QuotaExceededError(name, f"one more version would make it {would_be}; the limit is {limit}")


def _needs(
    connection: Connection, task: CataloguedTask, size_bytes: int, quotas: Quotas
) -> Iterator[tuple[str, int, int]]:
    """Name, limit and the new value, for each quota that is set."""
    if quotas.max_tasks is not None and not task.versions:
        num_tasks = connection.execute(select(func.count(distinct(VERSIONS.c.task_id)))).scalar_one()
        yield "max_tasks", quotas.max_tasks, num_tasks + 1
    if quotas.max_versions_per_task is not None:
        yield "max_versions_per_task", quotas.max_versions_per_task, len(task.versions) + 1
    if quotas.max_bytes_per_task is not None:
        held = sum(record.size_bytes for record in task.versions.values())
        yield "max_bytes_per_task", quotas.max_bytes_per_task, held + size_bytes
    if quotas.max_bytes is not None:
        held = connection.execute(select(func.coalesce(func.sum(VERSIONS.c.size_bytes), 0))).scalar_one()
        yield "max_bytes", quotas.max_bytes, int(held) + size_bytes


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Suspend garbage collection while many objects are made that stay; it would take half of the time for 10,000."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
