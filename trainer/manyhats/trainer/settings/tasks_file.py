"""Several tasks in one YAML file: what they share at the top, and a list ``tasks`` of each one's own settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from manyhats.settings.yaml_file import read_yaml
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.settings import TrainSettings
from manyhats.trainer.settings.settings_file import (
    DEFAULT_OUT,
    SHARED_BY_TASKS,
    check_names,
    make_settings,
    named,
    of_file,
    of_other_methods,
)

_TASKS = "tasks"
_QUANTIZATION = "nf4"


def read_tasks(file: Path, flags: Mapping[str, Any]) -> tuple[TrainSettings, ...]:
    """The settings of every task of a file.

    A shared setting that only some methods have applies to the tasks of those methods. ``out`` at the top is the parent
    of each task's directory; the base, and how it is computed, is the same for all.

    Args:
        file: YAML with settings by the flags' names, and the list ``tasks``.
        flags: settings that override the file's, including a task's own.

    Raises:
        SettingError: the file, or a setting of it; names the file or the task, and the setting.
    """
    content = read_yaml(file, _TASKS, SettingError)
    own = _own_settings(file, content.pop(_TASKS, None))
    with of_file(file, _TASKS):
        of_all = named(content)
        check_names(of_all)
    check_names(flags)
    shared = {**of_all, **flags}
    with of_file(file, _TASKS, of_all.keys() - flags.keys()):
        if "task" in shared:
            raise SettingError("task", "must be set for each task")
        _check_used(shared, [{**shared, **each} for each in own])
    return _all_distinct([_make(index, each, shared, flags) for index, each in enumerate(own)])


def _own_settings(file: Path, listed: object) -> list[dict[str, Any]]:
    if not isinstance(listed, list) or not listed:
        raise SettingError(_TASKS, f"{file} must have a list 'tasks' of at least one task's settings")
    own = []
    for index, content in enumerate(listed):
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise SettingError(f"{_TASKS}[{index}]", "must be a mapping of 'name: value' settings")
        with of_file(file, _TASKS):
            own.append(named(content))
            with _of_task(own[-1], index):
                check_names(own[-1])
    return own


@contextmanager
def _of_task(own: Mapping[str, Any], index: int) -> Iterator[None]:
    """Errors in one task's settings name the task, or its index if it has no name."""
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{_TASKS}[{own.get('task', index)}].{error.setting}", error.message) from error


def _check_used(shared: Mapping[str, Any], all_values: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a shared setting that no task's method has."""
    for name in shared:
        if all(name in of_other_methods(values.get("method")) for values in all_values):
            raise SettingError(name, "is not a setting of any task's method")


def _make(
    index: int, own: Mapping[str, Any], shared: Mapping[str, Any], flags: Mapping[str, Any]
) -> TrainSettings:
    with _of_task(own, index):
        for name in own.keys() & SHARED_BY_TASKS:
            raise SettingError(name, "is shared by all tasks: set it at the top")
        method = own.get("method", shared.get("method"))
        fitting = {name: shared[name] for name in shared.keys() - of_other_methods(method)}
        winning = {name: flags[name] for name in flags.keys() & fitting.keys()}
        outs = str(shared.get("out") or DEFAULT_OUT)
        values = {"quantization": _QUANTIZATION, **fitting, **own, **winning}
        values["out"] = own.get("out") or str(PurePath(outs, str(own.get("task"))))
        return make_settings(values)


def _all_distinct(tasks: Sequence[TrainSettings]) -> tuple[TrainSettings, ...]:
    """Refuse two tasks with the same name or directory."""
    directories: dict[Path, str] = {}
    for each in tasks:
        if [other.task for other in tasks].count(each.task) > 1:
            raise SettingError(f"{_TASKS}[{each.task}].task", "appears twice")
        other = directories.setdefault(Path(each.out).resolve(), each.task)
        if other != each.task:
            raise SettingError(f"{_TASKS}[{each.task}].out", f"is also used by {other}")
    return tuple(tasks)
