"""``manyhats doctor``: looks at what ``serve`` with the same settings would need, and at a running server."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from manyhats.cli.doctor.running import look_at_server
from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection
from manyhats.cli.options.settings import Given, refuse_unknown_variables, takes
from manyhats.cli.serve import ConfigFile, read_config
from manyhats.cli.terminal.extras import quiet_libraries
from manyhats.cli.terminal.failures import UsageError
from manyhats.cli.terminal.output import print_json
from manyhats.server.doctor.finding import Condition, Finding, failure
from manyhats.server.doctor.packages import look_at_packages, look_at_python
from manyhats.server.lifetime.config import SETTINGS, ServeConfig
from manyhats.trainer.settings.settings import SETTINGS as TRAIN_SETTINGS

HELP = """Say whether a server with these settings would work, and be fast.

Takes the flags, variables and file of "serve", and looks at what they need:
packages, processor, memory, model, compiled kernels, store, certificates,
tokens, ports. Nothing is fetched or changed. Each line says ok, warning or
failure, and what to do. The exit code is 1 if there is a failure.

With --server, it also calls a server that runs with these settings, instead
of looking whether its ports are free.

[bold]Examples[/bold]

  $ manyhats doctor --config server.yaml

  $ manyhats doctor --store s3://bucket/manyhats \\
    --catalogue postgresql+psycopg://db/manyhats

  $ manyhats doctor --server 127.0.0.1:50051 --json
"""

_PANEL = "A running server"


def _option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_PANEL, **settings)


Server: TypeAlias = Annotated[
    str | None, _option("--server", metavar="HOST:PORT", help="Call the server at this gRPC address.")
]
CallerCert: TypeAlias = Annotated[
    Path | None,
    _option(
        "--caller-cert", metavar="FILE", help="The caller's PEM certificate, as --tls-cert is the server's."
    ),
]
CallerKey: TypeAlias = Annotated[
    Path | None, _option("--caller-key", metavar="FILE", help="PEM key of that certificate.")
]
Timeout: TypeAlias = Annotated[
    float, _option("--timeout", metavar="SECONDS", min=0, help="Longest wait for each of its answers.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How to reach a running server; every field is an option."""

    server: Server = None
    timeout: Timeout = 30.0
    tls: opt.Tls = False
    tls_ca: opt.TlsCa = None
    caller_cert: CallerCert = None
    caller_key: CallerKey = None
    token: opt.Token = None
    token_in_clear: opt.TokenInClear = False

    def connection(self, server: str) -> Connection:
        """The same as other commands take it."""
        return Connection(
            server=server,
            timeout=self.timeout,
            tls=self.tls,
            tls_ca=self.tls_ca,
            tls_cert=self.caller_cert,
            tls_key=self.caller_key,
            token=self.token,
            token_in_clear=self.token_in_clear,
        )


@takes(flags=SETTINGS, running=Running)
def doctor(
    *, flags: Mapping[str, Any], running: Running, config: ConfigFile = None, as_json: Json = False
) -> None:
    """Say whether a server with these settings would work, and be fast."""
    findings = []
    for finding in _examine(flags, config, running):
        findings.append(finding)
        if not as_json:
            typer.echo(line(finding))
    if as_json:
        print_json([dataclasses.asdict(each) for each in findings])
    num_failures = sum(each.condition is Condition.FAILURE for each in findings)
    num_warnings = sum(each.condition is Condition.WARNING for each in findings)
    if not as_json:
        typer.echo(f"failures: {num_failures}, warnings: {num_warnings}", err=True)
    raise typer.Exit(1 if num_failures else 0)


def line(finding: Finding) -> str:
    """A finding as one line, without control characters."""
    advice = f" -> {finding.advice}" if finding.advice else ""
    text = f"{finding.condition.value:<8} {finding.subject}: {finding.text}{advice}"
    return "".join(char if char.isprintable() else " " for char in text)


def _examine(flags: Mapping[str, Any], file: Path | None, running: Running) -> Iterator[Finding]:
    yield from look_at_python()
    of_packages = list(look_at_packages("server"))
    yield from of_packages
    if any(each.condition is Condition.FAILURE for each in of_packages):
        return  # nothing else can be imported
    try:
        config = _config(flags, file)
    except UsageError as error:
        yield failure("settings", str(error), "see docs/settings.md, or `manyhats serve --help`")
        return
    _quieten()
    from manyhats.server.doctor.examination import examine

    yield from examine(config, is_running=running.server is not None)
    if running.server is not None:
        yield from look_at_server(running.connection(running.server), config)


def _config(flags: Mapping[str, Any], file: Path | None) -> ServeConfig:
    """The settings as ``serve`` reads them.

    Raises:
        UsageError: one is wrong.
    """
    refuse_unknown_variables(os.environ, SETTINGS, TRAIN_SETTINGS)
    from manyhats.engine.threads.openmp import sleep_soon

    sleep_soon()
    config, _ = read_config(Given.of(SETTINGS, flags, os.environ), file)
    return config


def _quieten() -> None:
    """What is worth saying is in the findings."""
    from manyhats.server.observability.logs import configure_logs

    configure_logs("text", "error")
    quiet_libraries()
