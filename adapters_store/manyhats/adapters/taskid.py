"""Task ids and adapter names: ``task`` (its active version) and ``task@3`` (that version)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from manyhats.adapters.errors import TaskIdInvalidError

TASK_ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class TaskName:
    """What a caller names: a task, or one version of it (None: the active one)."""

    task_id: str
    version: int | None = None

    def __str__(self) -> str:
        return self.task_id if self.version is None else f"{self.task_id}@{self.version}"


def check_task_id(task_id: str) -> str:
    """Return ``task_id`` if it is one.

    Raises:
        TaskIdInvalidError: it is not 1 to 63 of ``a-z 0-9 . _ -`` that begin and end with a letter or digit.
    """
    if TASK_ID.fullmatch(task_id) is None:
        raise TaskIdInvalidError(
            "a task id has 1 to 63 characters of a-z 0-9 . _ - and begins and ends with a letter or digit"
        )
    return task_id


def parse_name(name: str) -> TaskName:
    """Split ``task`` or ``task@3``.

    Raises:
        TaskIdInvalidError: the task id or the version is malformed.
    """
    task_id, separator, version = name.partition("@")
    check_task_id(task_id)
    if not separator:
        return TaskName(task_id)
    if _VERSION.fullmatch(version) is None:
        raise TaskIdInvalidError("a version is a whole number of at least 1, as in 'task@3'")
    return TaskName(task_id, int(version))
