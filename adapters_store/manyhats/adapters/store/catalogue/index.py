"""The catalogue in memory, which answers requests without any I/O."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Iterable

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.store.catalogue.task import CataloguedTask
from manyhats.adapters.taskid import TaskName


class CatalogueIndex:
    """All tasks by id. Every method is atomic, quick and thread-safe."""

    def __init__(self) -> None:
        # Re-entrant: a replacement's check may look something up.
        self._lock = threading.RLock()
        self._tasks: dict[str, CataloguedTask] = {}
        # (task id, version) in order, for pages.
        self._order: list[tuple[str, int]] = []
        self._digest_uses: Counter[str] = Counter()
        self._pinned: dict[tuple[str, int], AdapterRecord] = {}

    def task(self, task_id: str) -> CataloguedTask:
        """A task; without versions if it never existed."""
        with self._lock:
            return self._tasks.get(task_id) or CataloguedTask(task_id=task_id)

    def task_ids(self) -> frozenset[str]:
        """The tasks that have versions."""
        with self._lock:
            return frozenset(self._tasks)

    def resolve(self, name: TaskName) -> AdapterRecord:
        """The version a name refers to."""
        with self._lock:
            return self.task(name.task_id).find(name)

    def has_digest(self, digest: str) -> bool:
        """Whether any version of any task has a digest."""
        with self._lock:
            return digest in self._digest_uses

    def pinned(self) -> list[AdapterRecord]:
        """The versions that are to stay in memory."""
        with self._lock:
            return list(self._pinned.values())

    def page(self, *, task_id: str, after: tuple[str, int], max_records: int) -> list[AdapterRecord]:
        """Up to ``max_records`` versions after ``after`` (task id, version); of one task, or of all ("")."""
        with self._lock:
            start = bisect.bisect_right(self._order, max(after, (task_id, 0)))
            keys = self._order[start : start + max_records]
            return [self._tasks[task].versions[version] for task, version in keys if task_id in ("", task)]

    def put(self, task: CataloguedTask, check: Callable[[], None] = lambda: None) -> None:
        """Replace a task.

        Args:
            task: its new state.
            check: called first, while nobody can look anything up; raises to keep the task as it was.
        """
        with self._lock:
            check()
            before = self.task(task.task_id)
            self._forget(before.versions[version] for version in before.versions.keys() - task.versions)
            self._learn(task.versions[version] for version in task.versions.keys() - before.versions)
            for number in before.versions:
                self._pinned.pop((task.task_id, number), None)
            for number, record in task.versions.items():
                if record.is_pinned:
                    self._pinned[task.task_id, number] = record
            if task.versions:
                self._tasks[task.task_id] = task
            else:
                self._tasks.pop(task.task_id, None)

    def _forget(self, records: Iterable[AdapterRecord]) -> None:
        for record in records:
            del self._order[bisect.bisect_left(self._order, (record.task_id, record.version))]
            self._digest_uses[record.digest] -= 1
            if not self._digest_uses[record.digest]:
                del self._digest_uses[record.digest]

    def _learn(self, records: Iterable[AdapterRecord]) -> None:
        for record in records:
            bisect.insort(self._order, (record.task_id, record.version))
            self._digest_uses[record.digest] += 1
