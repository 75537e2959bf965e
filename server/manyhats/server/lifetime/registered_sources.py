"""Checks what is to be registered at start before anything is loaded: a model takes minutes, a wrong path none."""

from __future__ import annotations

from manyhats.adapters.errors import AdapterError, SourceNotAllowedError
from manyhats.adapters.sources.sources import check_source
from manyhats.server.errors import ConfigError
from manyhats.server.lifetime.config import ServeConfig


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
