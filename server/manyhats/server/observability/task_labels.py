"""Which tasks the metrics know, and which of them have their own series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from manyhats.adapters.artifact import AdapterRecord

BASE_LABEL = "_base"
OTHER_LABEL = "_other"


class TaskLabels:
    """Which tasks have their own series: registered ones, in the order first seen, up to a cap."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._registered: set[str] = set()
        self._labelled: set[str] = set()

    def add(self, task_id: str) -> None:
        """Note that a task is registered."""
        self._registered.add(task_id)

    def remove(self, task_id: str) -> None:
        """Note that a task is gone; its place is free for another."""
        self._registered.discard(task_id)
        self._labelled.discard(task_id)

    def label(self, task_id: str) -> str:
        """The label of a task; "" is the base model."""
        if not task_id:
            return BASE_LABEL
        if task_id in self._registered and len(self._labelled) < self._limit:
            self._labelled.add(task_id)
        return task_id if task_id in self._labelled else OTHER_LABEL


@dataclass(slots=True)
class TaskVersions:
    """What the metrics know about registered adapters: states and digests by task. Thread-safe."""

    _lock: Lock = field(default_factory=Lock)
    _by_task: dict[str, tuple[AdapterRecord, ...]] = field(default_factory=dict)

    def set(self, task_id: str, records: Sequence[AdapterRecord]) -> None:
        """Set a task's versions; without any, it is gone."""
        with self._lock:
            if records:
                self._by_task[task_id] = tuple(records)
            else:
                self._by_task.pop(task_id, None)

    def records(self) -> list[AdapterRecord]:
        """All versions."""
        with self._lock:
            return [record for records in self._by_task.values() for record in records]
