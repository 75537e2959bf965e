"""What is to be registered at start, looked at before anything is loaded: a model takes minutes, a wrong path none."""

from __future__ import annotations

from manyhats.adapters.errors import AdapterError, SourceNotAllowedError
from manyhats.adapters.sources.sources import check_source
from manyhats.server.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig


def check_registered_sources(config: ServeConfig) -> None:
    """Look whether an adapter lies wherever one is to be registered from.

    Raises:
        ConfigError: one is missing, cannot be read, is no adapter's directory or lies outside what is allowed; it names
            task, path and what is wrong.
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
