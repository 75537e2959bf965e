"""A replica's settings: a server's, less what is for ports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from manyhats.server.lifetime.config_file import check_registered_sources, make_config

_OF_PORTS = ("grpc_port", "http_port", "tls_cert", "tls_key", "tls_client_ca", "http_insecure")
_CALL_LIMIT_S = 3600.0


def read_settings(args: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[ServeConfig, float]:
    """The settings, and what a gRPC call may take at most.

    Args:
        args: a server's settings, by their names in a settings file; ``config``, such a file, which they win over; and
            ``call_limit_s``.
        environment: in which no setting may be.

    Raises:
        ConfigError: one is wrong, or is none of a replica's.
    """
    given = dict(args)
    limit_s = _seconds("call_limit_s", given.pop("call_limit_s", _CALL_LIMIT_S))
    return _config(given, environment), limit_s


def _config(given: dict[str, Any], environment: Mapping[str, str]) -> ServeConfig:
    for each in SETTINGS:
        if environment.get(each.variable) and each.name not in _OF_PORTS:
            raise ConfigError(
                each.name,
                f"is set by {each.variable}, which not every process of Ray sees: give it in the application's"
                " args, or in the file that `config` names there",
            )
    file = given.pop("config", None)
    config = make_config(given, None if file is None else Path(file))
    default = ServeConfig()
    for name in _OF_PORTS:
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(
                name, "is for a server's own ports; those of Ray Serve are set in its own config"
            )
    if config.token_file is None and not config.insecure:
        raise ConfigError(
            "token_file",
            "is needed, as Ray Serve's gRPC port can be reached by other machines; or insecure: true if the network"
            " is trusted",
        )
    check_registered_sources(config)
    return config


def _seconds(name: str, value: object) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(name, f"must be a number of seconds above 0, not {value!r}")
    return seconds
