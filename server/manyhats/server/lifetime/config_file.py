"""Where settings come from: a YAML file, overridden by flags; and whether what they name is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhats.adapters.errors import AdapterError, SourceNotAllowedError
from manyhats.adapters.sources.sources import check_source
from manyhats.engine.errors import FieldInvalidError
from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import SETTINGS, WORDING, ServeConfig
from manyhats.settings.reading import by_name, make, not_a_setting
from manyhats.settings.yaml_file import read_yaml

_NAMES = frozenset(each.name for each in SETTINGS)
_NAMES_IN_ENGINE = {each.field: each.name for each in SETTINGS}


def make_config(flags: Mapping[str, Any], file: Path | None = None) -> ServeConfig:
    """Settings from a file and flags.

    Args:
        flags: setting → value, named as in a file; None and empty collections count as not given.
        file: YAML, see ``read_file``; None for none.

    Raises:
        ConfigError: a setting is unknown, missing, of the wrong type or out of range; names it.
    """
    given = {name: value for name, value in flags.items() if value not in (None, (), [], {})}
    settings = {**(read_file(file) if file is not None else {}), **given}
    for name in settings.keys() - _NAMES:
        raise ConfigError(name, not_a_setting(name, _NAMES))
    try:
        return make(ServeConfig, settings, WORDING)
    except FieldInvalidError as error:  # the engine's settings are inconsistent
        name = error.field.rpartition(".")[2]
        raise ConfigError(_NAMES_IN_ENGINE.get(name, name), error.description) from error


def read_file(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name; the file may name them like flags.

    Raises:
        ConfigError: it cannot be read, is not a mapping, or has a setting twice.
    """
    return by_name(read_yaml(file, "config", ConfigError), SETTINGS, ConfigError)


def check_registered_sources(config: ServeConfig) -> None:
    """Check that there is an adapter at every path to register from.

    Raises:
        ConfigError: one is missing, cannot be read, is not an adapter's directory or is outside what is allowed; names
            the task, the path and the problem.
    """
    for task_id, uri in config.register.items():
        try:
            check_source(uri, config.adapter_roots, config.adapter_url_prefixes, config.adapter_limits)
        except AdapterError as error:
            place = "" if error.subject == uri else f"{uri}: "
            raise ConfigError("register", f"{task_id}: {place}{error}{_hint(error, config)}") from error


def _hint(error: AdapterError, config: ServeConfig) -> str:
    if isinstance(error, SourceNotAllowedError) and not (config.adapter_roots or config.adapter_url_prefixes):
        return "; --adapter-root names a directory that adapters may be registered from"
    return ""
