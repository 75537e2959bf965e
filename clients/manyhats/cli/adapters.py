"""``manyhats adapters``: which tasks a server knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli import adapter_files
from manyhats.cli import options as opt
from manyhats.cli.connection import connect
from manyhats.cli.failures import UsageError, command_group
from manyhats.cli.output import human_bytes, human_count, print_fields, print_json, print_table

if TYPE_CHECKING:
    from manyhats.client import AdapterInfo

HELP = """Register, list, show and delete the adapters behind tasks.

A task is a name such as sql. Each adapter registered for it becomes its
next version. Requests for sql get the active version, requests for
sql@2 that one.
"""
REGISTER_HELP = """Make an adapter the next version of a task.

PATH is a directory as PEFT saves it, with adapter_config.json and
adapter_model.safetensors, under one of the --adapter-root directories
of the server. The server copies it, so it may change or go afterwards.
The same files again make no new version.

[bold]Examples[/bold]

  $ manyhats adapters register sql ./tasks/sql

  $ manyhats adapters register sql ./tasks/sql --validate-only

  $ manyhats adapters register sql ./tasks/sql --no-activate
"""
LIST_HELP = """List the versions of one task, or of every task.

[bold]Examples[/bold]

  $ manyhats adapters list

  $ manyhats adapters list sql --json
"""
SHOW_HELP = """Show all there is to know of a version; without @VERSION, of the active one.

[bold]Examples[/bold]

  $ manyhats adapters show sql

  $ manyhats adapters show sql@2 --json
"""
DELETE_HELP = """Delete one version, or a task with all its versions.

[bold]Examples[/bold]

  $ manyhats adapters delete sql@1

  $ manyhats adapters delete sql --force
"""

app = command_group(HELP)
app.command("inspect", help=adapter_files.INSPECT_HELP)(adapter_files.inspect)
app.command("convert", help=adapter_files.CONVERT_HELP)(adapter_files.convert)

Task = Annotated[str, typer.Argument(metavar="TASK", help="A name of a-z, 0-9, dots, dashes, underscores.")]
Directory = Annotated[str, typer.Argument(metavar="PATH", help="The directory, as the server sees it.")]
Activate = Annotated[
    bool, typer.Option("--activate/--no-activate", help="Whether requests for the task get it from now on.")
]
ValidateOnly = Annotated[bool, typer.Option("--validate-only", help="Check everything and store nothing.")]
ExpectedDigest = Annotated[
    str, typer.Option("--expected-digest", metavar="sha256:...", help="Refuse other files than these.")
]
Label = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Kept with it. Repeatable.")
]
Name = Annotated[str, typer.Argument(metavar="TASK[@VERSION]", help="The task, or one version of it.")]


@app.command(help=REGISTER_HELP)
def register(
    task: Task,
    path: Directory,
    activate: Activate = True,
    validate_only: ValidateOnly = False,
    expected_digest: ExpectedDigest = "",
    label: Label = None,
    server: opt.Server = opt.DEFAULT_SERVER,
    timeout: opt.Timeout = None,
    as_json: opt.Json = False,
) -> None:
    """Make an adapter the next version of a task."""
    labels = parse_labels(label or [])
    with connect(server, timeout) as client:
        registration = client.register_adapter(
            task,
            as_uri(path),
            activate=activate,
            validate_only=validate_only,
            expected_digest=expected_digest,
            labels=labels,
        )
    if as_json:
        print_json(registration)
        return
    info = registration.adapter
    done = "valid" if validate_only else "registered" if registration.created else "already registered"
    facts = ", ".join((info.method, info.state, human_bytes(info.size_bytes), info.digest))
    typer.echo(f"{done}: {info.name} ({facts})")
    for note in info.notes:
        typer.echo(f"note: {note}", err=True)


@app.command("list", help=LIST_HELP)
def list_(
    task: Annotated[str, typer.Argument(metavar="[TASK]", help="Only this task's versions.")] = "",
    server: opt.Server = opt.DEFAULT_SERVER,
    timeout: opt.Timeout = None,
    as_json: opt.Json = False,
) -> None:
    """List the versions of one task, or of every task."""
    with connect(server, timeout) as client:
        listed = list(client.list_adapters(task_id=task))
    if as_json:
        print_json(listed)
    elif listed:
        columns = ("task", "method", "state", "in", "size", "created", "digest")
        print_table(columns, [_row(info) for info in listed])
    else:
        typer.echo("no adapters are registered", err=True)


@app.command(help=SHOW_HELP)
def show(
    task: Name,
    server: opt.Server = opt.DEFAULT_SERVER,
    timeout: opt.Timeout = None,
    as_json: opt.Json = False,
) -> None:
    """Show all there is to know of a version."""
    with connect(server, timeout) as client:
        info = client.get_adapter(task)
    if as_json:
        print_json(info)
    else:
        print_fields(_fields(info))


@app.command(help=DELETE_HELP)
def delete(
    task: Name,
    force: Annotated[bool, typer.Option("--force", help="Delete versions in use, too.")] = False,
    server: opt.Server = opt.DEFAULT_SERVER,
    timeout: opt.Timeout = None,
    as_json: opt.Json = False,
) -> None:
    """Delete one version, or a task with all its versions."""
    with connect(server, timeout) as client:
        deleted = client.delete_adapter(task, force=force)
    if as_json:
        print_json(deleted)
    else:
        typer.echo("deleted: " + ", ".join(info.name for info in deleted))


def as_uri(path: str) -> str:
    """A directory of this machine by its absolute path, as the server has another working directory."""
    return str(Path(path).resolve()) if "://" not in path and Path(path).exists() else path


def parse_labels(labels: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a mapping.

    Raises:
        UsageError: one has no ``=``, or no key.
    """
    parsed: dict[str, str] = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not (key and equals):
            raise UsageError(f"--label must be KEY=VALUE, not {label!r}")
        parsed[key] = value
    return parsed


def _row(info: AdapterInfo) -> tuple[str, ...]:
    created = f"{info.create_time:%Y-%m-%d %H:%M}" if info.create_time else ""
    return (
        info.name,
        info.method,
        info.state,
        info.residency,
        human_bytes(info.size_bytes),
        created,
        info.digest.removeprefix("sha256:")[:12],
    )


def _fields(info: AdapterInfo) -> dict[str, str]:
    return {
        "task": info.name,
        "method": info.method,
        "state": info.state + (f" ({info.state_reason})" if info.state_reason else ""),
        "in": info.residency,
        "size": human_bytes(info.size_bytes),
        "parameters": human_count(info.num_parameters),
        "effect": "" if info.effect is None else f"{info.effect:.4g}",
        "base model": info.base_model,
        "source": info.source,
        "created": info.create_time.isoformat() if info.create_time else "",
        "digest": info.digest,
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(info.labels.items())),
        "notes": "; ".join(info.notes),
    }
