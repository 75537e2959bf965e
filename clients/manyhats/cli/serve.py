"""``manyhats serve``: the server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from manyhats.cli.options.settings import Given, read_entries, refuse_unknown_variables, takes
from manyhats.cli.terminal.extras import needs_extra, quiet_libraries
from manyhats.cli.terminal.failures import UsageError
from manyhats.cli.terminal.progress import shown_progress
from manyhats.server.access.errors import ConfigError
from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from manyhats.settings.declaration import values_of
from manyhats.settings.printing import config_text
from manyhats.settings.reading import by_name, name_of
from manyhats.trainer.settings.settings import SETTINGS as TRAIN_SETTINGS

if TYPE_CHECKING:
    from manyhats.engine.progress import Progress

HELP = """Serve one base model and any number of tasks on it, over gRPC and HTTP.

[bold]Examples[/bold]

  $ manyhats serve --model smollm2-135m-instruct \\
    --store ./store --adapter-root ./tasks

  $ manyhats serve --config server.yaml --register sql=./tasks/sql

  $ manyhats serve --store s3://bucket/manyhats \\
    --catalogue postgresql+psycopg://db/manyhats

The first start gets the model and quantizes it; later ones take it from
the cache. When the line "ready" comes on stdout, requests are served.
Ctrl-C lets running requests finish, a second Ctrl-C ends them; before
that line comes it ends the start at once.

Each setting may also be a variable or in a file: --max-tasks 5 is
MANYHATS_MAX_TASKS=5, or "max_tasks: 5" in the file of --config.
"""

_FLAGS = {each.name: each.flag for each in SETTINGS}
(_REGISTER,) = (each for each in SETTINGS if each.name == "register")

_LOGS = "Settings file and logs"

ConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="MANYHATS_CONFIG",
        help="YAML with settings of the same names; flags and variables win.",
        rich_help_panel=_LOGS,
    ),
]
PrintConfig: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Serve nothing: print all settings, as such a file, and where each comes from.",
        rich_help_panel=_LOGS,
    ),
]


@takes(flags=SETTINGS)
def serve(*, flags: Mapping[str, Any], config: ConfigFile = None, print_config: PrintConfig = False) -> None:
    """Serve one base model and any number of tasks on it, over gRPC and HTTP."""
    refuse_unknown_variables(os.environ, SETTINGS, TRAIN_SETTINGS)
    given = Given.of(SETTINGS, flags, os.environ)
    with needs_extra("server"):
        from manyhats.engine.threads.openmp import sleep_soon

        sleep_soon()
        served, places = read_config(given, config)
    if print_config:
        typer.echo(config_text(SETTINGS, values_of(served), places), nl=False)
    else:
        raise typer.Exit(run(served))


def read_config(given: Given, file: Path | None) -> tuple[ServeConfig, dict[str, str]]:
    """The settings, and where each that is not a default comes from.

    Raises:
        UsageError: one is wrong.
    """
    from manyhats.server.lifetime.config_file import check_registered_sources, make_config
    from manyhats.settings.yaml_file import read_yaml

    keys: dict[str, str] = {}
    try:
        content = read_yaml(file, "config", ConfigError) if file is not None else {}
        keys = {name_of(key, SETTINGS): key.replace("-", "_") for key in content}
        in_file = by_name(content, SETTINGS, ConfigError)
        if "register" in in_file:
            in_file["register"] = register_of_file(f"{file}: register", in_file["register"])
        config = make_config({**in_file, **given.values})
        check_registered_sources(config)
    except ConfigError as error:
        raise UsageError(_where_given(error, given, file, keys)) from error
    return config, {**dict.fromkeys(keys, str(file)), **given.places}


def run(config: ServeConfig) -> int:
    """Serve until a signal, and return the exit code.

    Raises:
        CommandError: the server's packages are missing.
    """
    with needs_extra("server"):
        from manyhats.server.lifetime.process import EXIT_BY_SIGNAL
        from manyhats.server.lifetime.process import serve as serve_process
    quiet_libraries()
    has_bars = sys.stderr.isatty() and config.log_format == "text"
    code = asyncio.run(serve_process(config, show_progress=_bars if has_bars else None))
    if code > EXIT_BY_SIGNAL:
        # Threads that load or compile may still run, and are not waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _bars() -> AbstractContextManager[Progress]:
    """Progress bars, instead of progress lines in the log."""
    logging.getLogger("manyhats.loading").setLevel(logging.WARNING)
    return shown_progress()


def _where_given(error: ConfigError, given: Given, file: Path | None, keys: Mapping[str, str]) -> str:
    """What is wrong with a setting, by the flag, variable or file that gives it."""
    name = error.setting.partition(".")[0]
    problem = str(error).removeprefix(name)
    if name in given.places:
        return f"{given.places[name]}{problem}"
    if name in keys:
        is_known = name in _FLAGS
        return f"{'' if is_known else '--config: '}{file}: {keys[name]}{problem}"
    return f"--{_FLAGS.get(name, name)}{problem}"


def register_of_file(place: str, value: object) -> dict[str, str]:
    """A settings file's ``register``: a mapping of tasks to paths, or a list of ``TASK=PATH`` as the flag takes.

    Raises:
        UsageError: it is neither, or a task comes twice; names the place.
    """
    if isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return read_entries(_REGISTER, place, value)
    raise UsageError(f"{place}: must be a list of TASK=PATH, or a mapping such as {{sql: ./tasks/sql}}")
