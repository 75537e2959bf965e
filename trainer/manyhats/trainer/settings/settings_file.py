"""Where a run's settings come from: flags and a YAML file, one flat set of names, checked field by field.

A setting's name is its flag's, with underscores: ``--batch-size`` is ``batch_size``. The method is a setting, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.adapters.taskid import check_task_id
from manyhats.settings.declaration import settings_of
from manyhats.settings.reading import by_name, make, not_a_setting
from manyhats.settings.yaml_file import read_yaml
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.declaring import WORDING
from manyhats.trainer.settings.methods import (
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from manyhats.trainer.settings.settings import SETTINGS, ModelSettings, TrainSettings

_TASKS = "tasks"
_AS_SERVED = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method's name on the command line stands for.

    Attributes:
        settings: the class of its adapter's settings.
        fixed: settings that the name implies.
        quantization: the base's, by default.
        is_quantized: whether any other quantization is refused.
    """

    settings: type
    fixed: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = _AS_SERVED
    is_quantized: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The names of the method's own settings."""
        return frozenset(each.name for each in settings_of(self.settings))


METHODS: Mapping[str, Method] = {
    "lora": Method(settings=LoraSettings, quantization="none"),
    "qlora": Method(settings=LoraSettings, quantization="nf4", is_quantized=True),
    "dora": Method(settings=LoraSettings, fixed={"use_dora": True}),
    "ia3": Method(settings=Ia3Settings),
    "bottleneck": Method(settings=BottleneckSettings),
    "prefix": Method(settings=PrefixSettings),
    "prompt": Method(settings=PromptSettings),
    "ptuning": Method(settings=PTuningSettings),
}


"""The methods that can be trained, by their names on the command line."""


SHARED_BY_TASKS = frozenset(each.name for each in settings_of(ModelSettings))


"""Settings of the base, which tasks trained together share."""


_CONFIG = "config"


"""The flag that names a file of settings."""


DEFAULT_OUT = "tasks"


"""Contains the directory of each task that names none."""


_NAMES = frozenset({"method", *(each.name for each in SETTINGS)})


_OF_METHODS = frozenset(name for method in METHODS.values() for name in method.names)


def read_settings(
    file: Path, flags: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None
) -> TrainSettings:
    """A run's settings from a YAML file.

    Args:
        file: see ``read_file``.
        flags: settings that override the file's.
        otherwise: defaults for those that neither has.

    Raises:
        SettingError: as ``read_file`` and ``make_settings``; names the file if it set the value.
    """
    content = read_file(file)
    with of_file(file, _CONFIG, content.keys() - flags.keys()):
        return make_settings({**(otherwise or {}), **content, **flags})


def read_file(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, by their names here; the file may use dashes or underscores.

    Raises:
        SettingError: it cannot be read, is not a mapping, or has an unknown setting.
    """
    content = read_yaml(file, _CONFIG, SettingError)
    with of_file(file, _CONFIG):
        settings = named(content)
        check_names(settings)
    return settings


@contextmanager
def of_file(file: Path, flag: str, names: Collection[str] | None = None) -> Iterator[None]:
    """Errors in a file's settings name the file, and belong to the flag that named it.

    Args:
        names: of the settings that the file has; None if all are.
    """
    try:
        yield
    except SettingError as error:
        if names is not None and error.setting.partition(".")[0] not in names:
            raise
        raise SettingError(flag, f"{file}: {error}") from error


def named(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings by their names here.

    Raises:
        SettingError: one appears twice, under two names.
    """
    return by_name(content, SETTINGS, SettingError)


def check_names(names: Iterable[str]) -> None:
    """Refuse a name that is not a setting of any method.

    Raises:
        SettingError: there is one; names it.
    """
    for name in names:
        if name not in _NAMES:
            raise SettingError(name, not_a_setting(name, _NAMES))


def of_other_methods(method: object) -> frozenset[str]:
    """Settings that other methods have but this one does not; empty if it is not a method."""
    known = METHODS.get(method) if isinstance(method, str) else None
    return _OF_METHODS - known.names if known else frozenset()


def make_settings(values: Mapping[str, Any]) -> TrainSettings:
    """A run's settings, each checked for type and range.

    Args:
        values: setting → value; ``method``, ``task`` and ``data`` are required. None or empty counts as not given.

    Raises:
        SettingError: one is unknown, missing, of the wrong type, out of its range, or not of this method; names it.
    """
    given = {name: value for name, value in values.items() if value not in (None, (), [], {}, "")}
    check_names(given)
    method_name = _method_name(given)
    method = METHODS[method_name]
    for name in given.keys() & of_other_methods(method_name):
        raise SettingError(
            name, f"is not a setting of {method_name}, but of {', '.join(_methods_with(name))}"
        )
    quantization = given.get("quantization", method.quantization)
    if method.is_quantized and quantization != method.quantization:
        raise SettingError("quantization", f"{method_name} needs {method.quantization}; use lora for others")
    adapter = make(method.settings, given, WORDING, **method.fixed)
    if "data" not in given:
        raise SettingError("data", "must be given")
    values = {**given, "quantization": quantization, "task": _task(given)}
    return make(TrainSettings, values, WORDING, adapter=adapter)


def method_of(settings: TrainSettings) -> str:
    """The method's name, if it is a known one."""
    adapter = settings.adapter
    if isinstance(adapter, LoraSettings):
        return "dora" if adapter.use_dora else "qlora" if settings.model.quantization == "nf4" else "lora"
    return next(name for name, method in METHODS.items() if method.settings is type(adapter))


def _method_name(given: Mapping[str, Any]) -> str:
    name = given.get("method")
    known = ", ".join(METHODS)
    if name is None:
        raise SettingError("method", f"must be given: one of {known}")
    if name not in METHODS:
        raise SettingError("method", f"must be one of {known}, not {name!r}")
    return str(name)


def _methods_with(name: str) -> list[str]:
    return [method_name for method_name, method in METHODS.items() if name in method.names]


def _task(given: Mapping[str, Any]) -> str:
    task = given.get("task")
    if not isinstance(task, str):
        raise SettingError("task", "must be given" if task is None else f"must be a string, not {task!r}")
    try:
        return check_task_id(task)
    except TaskIdInvalidError as error:
        raise SettingError("task", f"{task!r} is not a task name: {error.description}") from error


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
    shared = {"quantization": _shared_quantization(shared, own), **shared}
    return _all_distinct([_make(index, each, shared, flags) for index, each in enumerate(own)])


def _shared_quantization(shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> str:
    """The base's by default: what one of the methods needs, or else a server's, for LoRA too."""
    known = (METHODS.get(str(each.get("method", shared.get("method")))) for each in own)
    needed = (method.quantization for method in known if method is not None and method.is_quantized)
    return next(needed, _AS_SERVED)


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
        values = {**fitting, **own, **winning}
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
