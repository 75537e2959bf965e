"""Where settings come from: a YAML file, overridden by flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from manyhats.server.config import ServeConfig
from manyhats.server.errors import ConfigError


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
    known = {each.name for each in fields(ServeConfig)}
    for name in settings.keys() - known:
        raise ConfigError(name, "is not a setting")
    try:
        return TypeAdapter(ServeConfig).validate_python(settings)
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


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:]
