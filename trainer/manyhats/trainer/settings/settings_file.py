"""Where a run's settings come from: flags and a YAML file, one flat set of names, checked field by field.

A setting's name is that of its flag with underscores: ``--batch-size`` is ``batch_size``. The method is a setting, too.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from manyhats.adapters.errors import TaskIdInvalidError
from manyhats.adapters.taskid import check_task_id
from manyhats.trainer.errors import SettingError
from manyhats.trainer.files.yaml_file import of_file, read_yaml
from manyhats.trainer.settings.settings import (
    BottleneckSettings,
    DataSettings,
    Ia3Settings,
    LoraSettings,
    ModelSettings,
    OptimizationSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    TrainSettings,
)

__all__ = [
    "DEFAULT_OUT",
    "METHODS",
    "SHARED_BY_TASKS",
    "Method",
    "check_names",
    "make_settings",
    "named",
    "of_other_methods",
    "read_file",
    "read_settings",
    "to_name",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method's name on the command line stands for.

    Attributes:
        settings: the class of its adapter's settings.
        fixed: those that the name itself says.
        quantization: of the base, where none is asked for.
        is_quantized: whether another quantization than that is refused.
    """

    settings: type
    fixed: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = "nf4"
    is_quantized: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The names of its own settings."""
        return frozenset(each.name for each in fields(self.settings)) - {"use_dora"}


METHODS: Mapping[str, Method] = {
    "lora": Method(settings=LoraSettings, quantization="none"),
    "qlora": Method(settings=LoraSettings, is_quantized=True),
    "dora": Method(settings=LoraSettings, fixed={"use_dora": True}),
    "ia3": Method(settings=Ia3Settings),
    "bottleneck": Method(settings=BottleneckSettings),
    "prefix": Method(settings=PrefixSettings),
    "prompt": Method(settings=PromptSettings),
    "ptuning": Method(settings=PTuningSettings),
}
"""The methods that can be trained, by their names on the command line."""

_NAMES_IN_DATA = {"train": "data"}
"""Fields of ``DataSettings`` whose flag has another name."""

_SINGULAR = {
    "label": "labels",
    "target_module": "target_modules",
    "output_module": "output_modules",
    "input_module": "input_modules",
}
"""Repeatable flags → the settings that they add to; a file may have either name."""

_OF_RUN = ("method", "task", "out", "save_dtype", "init_from")
_OF_DATA = {_NAMES_IN_DATA.get(each.name, each.name): each.name for each in fields(DataSettings)}
_OF_OPTIMIZATION = frozenset(each.name for each in fields(OptimizationSettings))
SHARED_BY_TASKS = frozenset(each.name for each in fields(ModelSettings))
"""Settings of the base, which tasks trained together have in common."""

_CONFIG = "config"
"""The flag that names a file of settings."""

DEFAULT_OUT = "tasks"
"""Has the directory of each task that names none."""

_COMMON = frozenset({*_OF_RUN, *_OF_DATA, *_OF_OPTIMIZATION, *SHARED_BY_TASKS})
_OF_METHODS = frozenset(name for method in METHODS.values() for name in method.names)


def read_settings(
    file: Path, flags: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None
) -> TrainSettings:
    """A run's settings of a YAML file.

    Args:
        file: see ``read_file``.
        flags: settings that win over the file's.
        otherwise: those that neither has.

    Raises:
        SettingError: as ``read_file`` and ``make_settings``; of what the file sets it names the file.
    """
    content = read_file(file)
    with of_file(file, _CONFIG, content.keys() - flags.keys()):
        return make_settings({**(otherwise or {}), **content, **flags})


def read_file(file: Path) -> dict[str, Any]:
    """Settings of a YAML file, dashes or underscores in their names, by their names here.

    Raises:
        SettingError: it cannot be read, is not a mapping, or has a name that is no setting.
    """
    content = read_yaml(file, _CONFIG)
    with of_file(file, _CONFIG):
        settings = named(content)
        check_names(settings)
    return settings


def named(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings by their names here.

    Raises:
        SettingError: one is there twice, by two names.
    """
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = to_name(key)
        if name in settings:
            raise SettingError(name, "is given twice")
        settings[name] = value
    return settings


def to_name(name: str) -> str:
    """A setting's name here, of one with dashes or in the singular."""
    name = name.replace("-", "_")
    return _SINGULAR.get(name, name)


def check_names(names: Iterable[str]) -> None:
    """Refuse a name that is no setting of any method.

    Raises:
        SettingError: there is one; names it.
    """
    for name in names:
        if name not in _COMMON | _OF_METHODS:
            near = difflib.get_close_matches(name.lower(), _COMMON | _OF_METHODS, n=1)
            raise SettingError(
                name, f"is not a setting; did you mean {near[0]}?" if near else "is not a setting"
            )


def of_other_methods(method: object) -> frozenset[str]:
    """Settings that a method does not have, but others do; none where it is no method."""
    known = METHODS.get(method) if isinstance(method, str) else None
    return _OF_METHODS - known.names if known else frozenset()


def make_settings(values: Mapping[str, Any]) -> TrainSettings:
    """A run's settings, each of its type and in its range.

    Args:
        values: setting → value; ``method``, ``task`` and ``data`` must be there. A None or empty one is not given.

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
    of_model = {"quantization": method.quantization, **_select(given, SHARED_BY_TASKS)}
    if method.is_quantized and of_model["quantization"] != method.quantization:
        raise SettingError(
            "quantization", f"{method_name} trains on {method.quantization}; lora trains on others"
        )
    sections = {
        "adapter": _validated(method.settings, {**_select(given, method.names), **method.fixed}),
        "data": _validated(DataSettings, _data(given)),
        "optimization": _validated(OptimizationSettings, _select(given, _OF_OPTIMIZATION)),
        "model": _validated(ModelSettings, of_model),
    }
    return _validated(TrainSettings, {"task": _task(given), **_select(given, _OF_RUN[2:]), **sections})


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
        raise SettingError("task", "must be given" if task is None else f"must be a text, not {task!r}")
    try:
        return check_task_id(task)
    except TaskIdInvalidError as error:
        raise SettingError("task", f"{task!r} is none: {error.description}") from error


def _data(given: Mapping[str, Any]) -> dict[str, Any]:
    if "data" not in given:
        raise SettingError("data", "must be given")
    return {at: given[name] for name, at in _OF_DATA.items() if name in given}


def _select(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


Settings = TypeVar("Settings")


def _validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """One section, its values converted where nothing is lost, such as the text ``1e-4`` to a number.

    Raises:
        SettingError: a value has the wrong type, or is out of its range.
    """
    hints = get_type_hints(kind)
    prepared = {name: _prepared(name, value, hints[name]) for name, value in values.items()}
    try:
        return TypeAdapter(kind).validate_python(prepared)
    except SettingError as error:
        raise SettingError(_flag_name(error.setting), error.message) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = [_flag_name(str(first["loc"][0])), *map(str, first["loc"][1:])]
        raise SettingError(".".join(where), _plain(first["msg"])) from error


def _prepared(name: str, value: Any, hint: Any) -> Any:
    """The value, as pydantic understands it.

    YAML reads ``yes`` as true and one word of a list as a text; pydantic would take true for 1.
    """
    if isinstance(value, bool) and hint is not bool:
        raise SettingError(
            _flag_name(name), f"must not be {str(value).lower()}; quote a word that YAML takes so"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(_flag_name(name), "must be a finite number")
    if isinstance(value, str) and get_origin(hint) is tuple:
        return (value,)
    return value


def _flag_name(field_name: str) -> str:
    return _NAMES_IN_DATA.get(field_name, field_name)


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:]
