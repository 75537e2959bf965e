"""The catalogue: which versions a task has and which one is active; kept in this process's memory."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import NoActiveVersionError, TaskNotFoundError
from manyhats.adapters.taskid import TaskName


@dataclass(slots=True)
class _Task:
    """One task; ``active`` is a version, or None."""

    versions: dict[int, AdapterRecord] = field(default_factory=dict)
    active: int | None = None


class Catalogue:
    """Tasks, versions and states. Every method is atomic, quick and safe to call from any thread."""

    def __init__(self) -> None:
        # Re-entrant: a check of ``remove`` may look something up.
        self._lock = threading.RLock()
        self._tasks: dict[str, _Task] = {}
        # (task id, version) in order, for pages.
        self._order: list[tuple[str, int]] = []
        # Outlives its task, so that a name like "task@3" never comes to mean other bytes.
        self._last_version: dict[str, int] = {}
        self._digest_uses: Counter[str] = Counter()

    def add(self, record: AdapterRecord, *, activate: bool) -> AdapterRecord:
        """Add a version; the record comes back with its version number and state."""
        with self._lock:
            version = self._last_version.get(record.task_id, 0) + 1
            self._last_version[record.task_id] = version
            task = self._tasks.setdefault(record.task_id, _Task())
            added = replace(record, version=version, state=AdapterState.INACTIVE)
            task.versions[version] = added
            self._digest_uses[record.digest] += 1
            bisect.insort(self._order, (record.task_id, version))
            return self._activate(task, version) if activate else added

    def activate(self, task_id: str, version: int) -> AdapterRecord:
        """Make a version the one that its task's name means.

        Raises:
            TaskNotFoundError: there is no such version.
        """
        with self._lock:
            self._find(TaskName(task_id, version))
            return self._activate(self._tasks[task_id], version)

    def resolve(self, name: TaskName) -> AdapterRecord:
        """The version that a name means: the one it gives, or the active one.

        Raises:
            TaskNotFoundError: no such task or version.
            NoActiveVersionError: the name gives no version and none is active.
        """
        with self._lock:
            return self._find(name)

    def versions(self, task_id: str) -> tuple[AdapterRecord, ...]:
        """All versions of a task, oldest first.

        Raises:
            TaskNotFoundError: no such task.
        """
        with self._lock:
            return tuple(self._require(task_id).versions.values())

    def find_digest(self, task_id: str, digest: str) -> AdapterRecord | None:
        """The version of a task that has a digest."""
        with self._lock:
            task = self._tasks.get(task_id, _Task())
            return next((record for record in task.versions.values() if record.digest == digest), None)

    def has_digest(self, digest: str) -> bool:
        """Whether any version of any task has a digest."""
        with self._lock:
            return digest in self._digest_uses

    def digests(self) -> frozenset[str]:
        """Digests of all versions."""
        with self._lock:
            return frozenset(self._digest_uses)

    def page(self, *, task_id: str, after: tuple[str, int], max_records: int) -> list[AdapterRecord]:
        """Up to ``max_records`` versions behind ``after`` (task id, version); of one task, or of all ("")."""
        with self._lock:
            start = bisect.bisect_right(self._order, max(after, (task_id, 0)))
            keys = self._order[start : start + max_records]
            return [self._tasks[task].versions[version] for task, version in keys if task_id in ("", task)]

    def remove(
        self, name: TaskName, check: Callable[[Sequence[AdapterRecord]], None]
    ) -> tuple[AdapterRecord, ...]:
        """Remove a version, or all versions of a task.

        Args:
            name: with a version, that one; without, all.
            check: called with what would go, while nobody can resolve it; raises to keep it.

        Returns:
            What was removed.

        Raises:
            TaskNotFoundError: no such task or version.
        """
        with self._lock:
            task = self._require(name.task_id)
            gone = tuple(task.versions.values()) if name.version is None else (self._find(name),)
            check(gone)
            for record in gone:
                self._drop(task, record)
            return gone

    def _drop(self, task: _Task, record: AdapterRecord) -> None:
        del task.versions[record.version]
        del self._order[bisect.bisect_left(self._order, (record.task_id, record.version))]
        self._digest_uses[record.digest] -= 1
        if not self._digest_uses[record.digest]:
            del self._digest_uses[record.digest]
        if task.active == record.version:
            task.active = None
        if not task.versions:
            del self._tasks[record.task_id]

    def _activate(self, task: _Task, version: int) -> AdapterRecord:
        if task.active is not None:
            task.versions[task.active] = replace(task.versions[task.active], state=AdapterState.INACTIVE)
        task.active = version
        task.versions[version] = replace(task.versions[version], state=AdapterState.ACTIVE)
        return task.versions[version]

    def _require(self, task_id: str) -> _Task:
        if task_id not in self._tasks:
            raise TaskNotFoundError(task_id, "no such task")
        return self._tasks[task_id]

    def _find(self, name: TaskName) -> AdapterRecord:
        task = self._require(name.task_id)
        version = task.active if name.version is None else name.version
        if version is None:
            raise NoActiveVersionError(name.task_id, "none of its versions is active")
        if version not in task.versions:
            raise TaskNotFoundError(str(name), "no such version")
        return task.versions[version]
