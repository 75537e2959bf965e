"""``manyhats token``: tokens for the callers of a server."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.terminal.extras import needs_extra
from manyhats.cli.terminal.failures import CommandError, UsageError, command_group
from manyhats.cli.terminal.output import print_json

HELP = """Make tokens for the callers of a server.

A server started with --token-file admits callers with a token from that
file. The file holds only digests, so it gives no token away; to revoke a
token, delete its entry. Running servers notice either at once.
"""
NEW_HELP = """Add a token to a token file, and print it, just this once.

[bold]Examples[/bold]

  $ manyhats token new ops --file tokens.yaml --role generate --role manage

  $ manyhats token new ci --file tokens.yaml --task sql --task "team-a.*"

The roles are generate (the default: answers, scores, tokens) and manage
(register, upload, activate, delete); both may look at adapters. Without
--task a token gives access to every task and the base model; with it, to
the tasks that match, and to the base model if one is _base.
"""

app = command_group(HELP)

_EMPTY = "# Who may call: digests of tokens, their roles and tasks. See docs/security.md.\n"


@app.command("new", help=NEW_HELP)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the server's logs call it.")],
    file: Annotated[Path, typer.Option("--file", metavar="FILE", help="The token file; created if missing.")],
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role", metavar="generate|manage", help="What it may do. Repeatable.", show_default="generate"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="GLOB", help="Tasks it gives access to. Repeatable."),
    ] = None,
    max_priority: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The highest priority that its calls may ask for.",
            show_default="any with the role manage, else 0",
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Add a token to a token file, and print it."""
    with needs_extra("server"):
        from manyhats.server.access.errors import ConfigError
        from manyhats.server.access.tokens import Role, new_token, parse_tokens, token_entry
    token = new_token()
    try:
        roles = [Role(text) for text in role or ["generate"]]
    except ValueError:
        raise UsageError("--role must be generate or manage") from None
    try:
        text = _read(file) + token_entry(name, token, roles, task or (), max_priority)
        parse_tokens(text, str(file))
    except ConfigError as error:
        raise CommandError(str(error).removeprefix(f"{error.setting}: ")) from error
    _replace(file, text)
    if as_json:
        print_json({"name": name, "token": token})
    else:
        typer.echo(token)


def _read(file: Path) -> str:
    try:
        text = file.read_text()
    except FileNotFoundError:
        return _EMPTY
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {file}: {error}") from error
    return text if text.endswith("\n") or not text else f"{text}\n"


def _replace(file: Path, text: str) -> None:
    """Write the file atomically: a running server must not read half of it."""
    target = file.resolve()
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with open(descriptor, "w") as made:
                made.write(text)
            if target.exists():
                os.chmod(name, target.stat().st_mode & 0o777)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from error
