"""``manyhats adapters``: the tasks that exist, and the adapters behind them."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.adapters import files as adapter_files
from manyhats.cli.adapters import register as adapter_register
from manyhats.cli.adapters import store as adapter_store
from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.terminal.failures import CommandError, command_group
from manyhats.cli.terminal.output import human_bytes, human_count, print_fields, print_json, print_table

if TYPE_CHECKING:
    from manyhats.client import AdapterInfo

HELP = """Register, list, activate, pin and delete the adapters behind tasks.

A task is a name such as sql. Each adapter registered for it becomes its
next version. Requests for sql get the active version, requests for
sql@2 that one.
"""
LIST_HELP = """List the versions of one task, or of every task.

[bold]Examples[/bold]

  $ manyhats adapters list

  $ manyhats adapters list sql --json
"""
SHOW_HELP = """Show everything about a version; without @VERSION, about the active one.

[bold]Examples[/bold]

  $ manyhats adapters show sql

  $ manyhats adapters show sql@2 --json
"""
ACTIVATE_HELP = """Make a version the active one of its task: forward, or back.

Running requests finish on the version they began on. The version is loaded
first, so that no request waits for it.

[bold]Examples[/bold]

  $ manyhats adapters activate sql@2
"""
PIN_HELP = """Keep a version in memory, so that no request ever waits for it to load.

It holds for every server of the store, until it is unpinned. Without
@VERSION it is the task that is pinned: whichever version is active.

[bold]Examples[/bold]

  $ manyhats adapters pin sql

  $ manyhats adapters pin sql@1
"""
UNPIN_HELP = """Let a version leave memory again; without @VERSION, all of a task.

[bold]Examples[/bold]

  $ manyhats adapters unpin sql
"""
DELETE_HELP = """Delete one version, or a task with all its versions.

[bold]Examples[/bold]

  $ manyhats adapters delete sql@1

  $ manyhats adapters delete sql --force
"""

app = command_group(HELP)
_SERVER = "On a server"
_FILES = "Directories on this machine"
_STORE = "A store, with or without a server"

app.command(help=adapter_register.REGISTER_HELP, rich_help_panel=_SERVER)(adapter_register.register)
app.command(help=adapter_register.UPLOAD_HELP, rich_help_panel=_SERVER)(adapter_register.upload)
app.command(help=adapter_files.INSPECT_HELP, rich_help_panel=_FILES)(adapter_files.inspect)
app.command(help=adapter_files.CONVERT_HELP, rich_help_panel=_FILES)(adapter_files.convert)
app.command(help=adapter_store.VERIFY_HELP, rich_help_panel=_STORE)(adapter_store.verify)
app.command(help=adapter_store.GC_HELP, rich_help_panel=_STORE)(adapter_store.gc)
app.command(help=adapter_store.EXPORT_HELP, rich_help_panel=_STORE)(adapter_store.export)

Name = Annotated[str, typer.Argument(metavar="TASK[@VERSION]", help="The task, or one version of it.")]


@app.command("list", help=LIST_HELP, rich_help_panel=_SERVER)
@takes_connection
def list_(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Only this task's versions.")] = "",
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """List the versions of one task, or of every task."""
    with connect(connection) as client:
        listed = list(client.list_adapters(task_id=task))
    if task and not listed:
        raise CommandError(f"no task {task!r}; `manyhats adapters list` shows what there is")
    if as_json:
        print_json(listed)
    elif listed:
        columns = ("task", "method", "state", "in", "size", "created (UTC)", "digest")
        print_table(columns, [_row(info) for info in listed])
    else:
        typer.echo("no adapters are registered", err=True)


@app.command(help=SHOW_HELP, rich_help_panel=_SERVER)
@takes_connection
def show(
    task: Name,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Show everything about a version."""
    with connect(connection) as client:
        info = client.get_adapter(task)
    if as_json:
        print_json(info)
    else:
        print_fields(_fields(info))


@app.command(help=ACTIVATE_HELP, rich_help_panel=_SERVER)
@takes_connection
def activate(
    version: Annotated[str, typer.Argument(metavar="TASK@VERSION", help="The version.")],
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Make a version the active one of its task."""
    with connect(connection) as client:
        info = client.activate_adapter(version)
    if as_json:
        print_json(info)
    else:
        typer.echo(f"active: {info.name} ({info.method}, {info.digest})")


@app.command(help=PIN_HELP, rich_help_panel=_SERVER)
@takes_connection
def pin(
    task: Name,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Keep a version in memory."""
    with connect(connection) as client:
        info = client.pin_adapter(task)
    if as_json:
        print_json(info)
    else:
        typer.echo(f"pinned: {info.name}" + ("" if "@" in task else f", the active version of {task}"))


@app.command(help=UNPIN_HELP, rich_help_panel=_SERVER)
@takes_connection
def unpin(
    task: Name,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Let a version leave memory again."""
    with connect(connection) as client:
        info = client.unpin_adapter(task)
    if as_json:
        print_json(info)
    elif info.pinned:
        typer.echo(f"{info.name} is still pinned as the active version: unpin {info.task_id}")
    else:
        typer.echo(f"unpinned: {task}")


@app.command(help=DELETE_HELP, rich_help_panel=_SERVER)
@takes_connection
def delete(
    task: Name,
    force: Annotated[bool, typer.Option("--force", help="Delete versions even if they are in use.")] = False,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Delete one version, or a task with all its versions."""
    with connect(connection) as client:
        deleted = client.delete_adapter(task, force=force)
    if as_json:
        print_json(deleted)
    else:
        typer.echo("deleted: " + ", ".join(info.name for info in deleted))


_WHERE = {"device": "memory"}


def _where(info: AdapterInfo) -> str:
    return _WHERE.get(info.residency, info.residency) + (", pinned" if info.pinned else "")


def _row(info: AdapterInfo) -> tuple[str, ...]:
    created = f"{info.create_time.astimezone(UTC):%Y-%m-%d %H:%M}" if info.create_time else ""
    return (
        info.name,
        info.method,
        info.state,
        _where(info),
        human_bytes(info.size_bytes),
        created,
        info.digest.removeprefix("sha256:")[:12],
    )


def _fields(info: AdapterInfo) -> dict[str, str]:
    return {
        "task": info.name,
        "method": info.method,
        "kind": info.kind,
        "classes": ", ".join(info.class_labels),
        "pooling": info.pooling,
        "state": info.state + (f" ({info.state_reason})" if info.state_reason else ""),
        "in": _where(info),
        "size": human_bytes(info.size_bytes),
        "parameters": human_count(info.num_parameters),
        "effect": "" if info.effect is None else f"{info.effect:.4g} nats",
        "base model": info.base_model,
        "source": info.source,
        "created": f"{info.create_time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if info.create_time else "",
        "digest": info.digest,
        **_parts(info),
        "text files": ", ".join(sorted({name for part in info.parts for name in part.text_files})),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(info.labels.items())),
        "notes": "; ".join(info.notes),
    }


def _parts(info: AdapterInfo) -> dict[str, str]:
    """The parts of a composed task; a plain one's only part is itself."""
    if [part.digest for part in info.parts] == [info.digest]:
        return {}
    return {
        f"part {number}": f"{part.weight:g} × {part.source} ({part.digest})"
        for number, part in enumerate(info.parts)
    }
