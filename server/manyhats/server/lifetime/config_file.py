"""Where settings come from: a YAML file, overridden by flags."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from manyhats.server.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.sizes import parse_size

_WORDS = {
    "Input should be": "must be",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
    "a valid": "a",
    "a integer": "a whole number",
}
_NAMES = frozenset(each.name for each in fields(ServeConfig))


def make_config(flags: Mapping[str, Any], file: Path | None = None) -> ServeConfig:
    """Settings from a file and flags.

    Args:
        flags: setting → value, named as in ``ServeConfig``; None and empty collections mean "not given".
        file: YAML with the same names, dashes or underscores; None for none.

    Raises:
        ConfigError: a setting is unknown, missing, of the wrong type or out of its range; names it.
    """
    given = {name: value for name, value in flags.items() if value not in (None, (), [], {})}
    settings = {**(read_file(file) if file is not None else {}), **given}
    for name in settings.keys() - _NAMES:
        raise ConfigError(name, not_a_setting(name))
    try:
        return TypeAdapter(ServeConfig).validate_python(_with_sizes(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = ".".join(str(part) for part in first["loc"]) or "config"
        raise ConfigError(setting, _plain(first["msg"])) from error


def read_file(file: Path) -> dict[str, Any]:
    """Settings of a YAML file.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("config", f"cannot read {file}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError("config", f"{file} must hold settings, one 'name: value' each")
    return {key.replace("-", "_"): value for key, value in content.items()}


def check_names(file: Path, settings: Mapping[str, Any], others: Collection[str] = ()) -> None:
    """Refuse a file with a name that is no setting.

    Args:
        file: for the error.
        settings: of the file.
        others: names that a file may have besides those of ``ServeConfig``.

    Raises:
        ConfigError: there is one; names the file, the setting, and the nearest that there is.
    """
    for name in settings:
        if name not in _NAMES and name not in others:
            raise ConfigError("config", f"{file}: {name}: {not_a_setting(name)}")


def not_a_setting(name: str) -> str:
    """What is said of a name that is no setting."""
    near = difflib.get_close_matches(name.lower(), _NAMES, n=1)
    return f"is not a setting; did you mean {near[0]}?" if near else "is not a setting"


def _with_sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the sizes among them as numbers of bytes."""
    parsed = dict(settings)
    for name, value in settings.items():
        if "bytes" in name.split("_") and isinstance(value, str):
            try:
                parsed[name] = parse_size(value)
            except ValueError as error:
                raise ConfigError(name, str(error)) from error
    return parsed


def _plain(message: str) -> str:
    """Of what pydantic says, the same in the words of a settings file."""
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]
