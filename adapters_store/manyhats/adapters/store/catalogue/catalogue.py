"""The catalogue: which versions a task has and which one is active. Durable tables behind an index in memory.

The tables are the truth, and several processes share them. The index answers what requests ask without any
I/O. A write of this process is in the index when it returns, one of another process after ``refresh``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.quotas import Quotas
from manyhats.adapters.registration import Registered, Registration
from manyhats.adapters.store.catalogue.answers import read_answer, write_answer
from manyhats.adapters.store.catalogue.database import IN_MEMORY, CatalogueDatabase, WriteTransaction
from manyhats.adapters.store.catalogue.index import CatalogueIndex
from manyhats.adapters.store.catalogue.quotas import check_quotas
from manyhats.adapters.store.catalogue.rows import (
    read_changed_tasks,
    read_generation,
    read_named_digests,
    read_task,
    write_task,
)
from manyhats.adapters.store.catalogue.task import CataloguedTask
from manyhats.adapters.taskid import TaskName

__all__ = ["IN_MEMORY", "Catalogue"]


class Catalogue:
    """Tasks, versions and states. Every method is atomic and safe to call from any thread.

    ``resolve``, ``versions``, ``find_digest``, ``has_digest`` and ``page`` look into memory. The others wait
    for the database. Where it fails they raise ``StoreUnavailableError``, or ``StoreFullError`` if its disk is
    full; nothing has changed then, and look-ups go on answering what was known.

    Args:
        url: ``sqlite:////directory/catalogue.db`` in a directory that exists,
            ``postgresql+psycopg://user@host/database``, or ``IN_MEMORY``.

    Raises:
        StoreConfigError: the URL is not one of these, or its tables are of another version of this software.
        StoreUnavailableError: the database cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._database = CatalogueDatabase(url)
        self._index = CatalogueIndex()
        # The order in which this process reads the tables is the order in which it changes the index.
        self._lock = threading.Lock()
        self._seen_generation = 0
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    @property
    def catalogue_id(self) -> str:
        """Tells these tables from any other; random, made with them."""
        return self._database.catalogue_id

    def resolve(self, name: TaskName) -> AdapterRecord:
        """The version that a name means: the one it gives, or the active one.

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

    def page(self, *, task_id: str, after: tuple[str, int], max_records: int) -> list[AdapterRecord]:
        """Up to ``max_records`` versions behind ``after`` (task id, version); of one task, or of all ("")."""
        return self._index.page(task_id=task_id, after=after, max_records=max_records)

    def recall(self, registration: Registration) -> Registered | None:
        """The answer that its request id was given, by whatever process; None if it is new.

        Raises:
            RequestIdReusedError: it was used for something else.
        """
        if not registration.request_id:
            return None
        with self._database.read() as connection:
            return read_answer(connection, registration)

    def remember(self, registration: Registration, answer: Registered) -> Registered:
        """Keep an answer that changed nothing; gives the first answer to its request id.

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
        """Register a version, whose artifacts are stored.

        If its request id was answered, nothing happens. If the task has a version of this digest, that
        is the one: it has not failed any more, and is activated if that is asked. Otherwise a version is
        added.

        Args:
            record: what to add; its version and state do not count.
            registration: what the caller asked for.
            quotas: must hold with one more version.

        Returns:
            The first answer to its request id, which every later call with it gets.

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
        """Refuse early what ``add`` would refuse now: one more version of a task, of this size.

        Raises:
            QuotaExceededError: a quota does not allow it.
        """
        with self._database.read() as connection:
            check_quotas(connection, read_task(connection, task_id), size_bytes, quotas)

    def activate(self, task_id: str, version: int) -> AdapterRecord:
        """Make a version the one that its task's name means.

        Raises:
            TaskNotFoundError: there is no such version.
            DataLossError: it has failed.
        """
        with self._changing(task_id) as change:
            change.to(change.task.activated(version))
            return change.task.versions[version]

    def set_failure(self, task_id: str, version: int, reason: str) -> AdapterRecord:
        """Say that a version cannot be served and why; or, with an empty reason, that it can.

        It stays what its task's name means if it was, so that requests are refused for the right reason.

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
            name: with a version, that one; without, all.
            check: called with what would go, while nobody in this process can resolve it; raises to keep it.
                It must be quick, and may look things up here but not write.

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
        """Learn what was written since the last call.

        Returns:
            The tasks that changed, whichever process changed them.
        """
        with self._lock:
            with self._database.read() as connection:
                generation = read_generation(connection)
                if generation == self._seen_generation:
                    return frozenset()
                changed = read_changed_tasks(connection, self._seen_generation)
            for task in changed:
                self._index.put(task)
            self._seen_generation = generation
            return frozenset(task.task_id for task in changed)

    def generation(self) -> int:
        """How many writes the database has seen; cheap enough to poll for changes."""
        with self._database.read() as connection:
            return read_generation(connection)

    def named(self, digests: Collection[str]) -> frozenset[str]:
        """Those digests whose artifact some version in the database is made of, whoever registered it."""
        with self._database.read() as connection:
            return read_named_digests(connection, digests)

    def close(self) -> None:
        """Close the connections to the database; look-ups go on."""
        self._database.close()

    @contextlib.contextmanager
    def _changing(self, task_id: str) -> Iterator[_Change]:
        """One transaction on one task, whose end is in the index when it is committed."""
        with self._lock:
            known = self._index.task(task_id)
            try:
                with self._database.write() as transaction:
                    change = _Change(transaction, read_task(transaction.connection, task_id))
                    yield change
            except BaseException:
                self._index.put(known)  # a removal that is not committed has hidden versions
                raise
            self._index.put(change.task)


class _Change:
    """What a transaction makes of one task."""

    def __init__(self, transaction: WriteTransaction, task: CataloguedTask) -> None:
        self.transaction = transaction
        self.task = task

    def to(self, task: CataloguedTask) -> None:
        """Write the task as it is from now on."""
        self.task = write_task(self.transaction, self.task, task)
