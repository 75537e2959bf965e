"""The ``manyhats`` command. Nothing heavy is imported here; each command does so when it runs."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from manyhats.cli import adapters, chat, generate, info, model, score, serve, token, train
from manyhats.cli.failures import Commands, help_without_command
from manyhats.cli.train_process import restart_with_steady_heap

HELP = """Many fine-tuned tasks on one resident 4-bit base model.

[bold]First steps[/bold]

  $ manyhats serve --model smollm2-135m-instruct \\
    --store ./store --adapter-root ./tasks

  $ manyhats generate "The capital of France is"

  $ manyhats adapters register sql ./tasks/sql

  $ manyhats generate --task sql "List all users older than 30."

Every command has --help with examples. It exits with 0 only if it did
what it was asked; an error is one line on stderr.
"""

app = typer.Typer(
    cls=Commands,
    help=HELP,
    invoke_without_command=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"manyhats {metadata.version('manyhats')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    help_without_command(context)


_SERVER = "Run a server"
_TRAINER = "Make adapters"
_CLIENT = "Talk to a server"

app.command(help=serve.HELP, rich_help_panel=_SERVER)(serve.serve)
app.add_typer(model.app, name="model", rich_help_panel=_SERVER)
app.add_typer(token.app, name="token", rich_help_panel=_SERVER)
app.command(help=train.HELP, rich_help_panel=_TRAINER)(train.train)
app.command(help=generate.HELP, rich_help_panel=_CLIENT)(generate.generate)
app.command(help=chat.HELP, rich_help_panel=_CLIENT)(chat.chat)
app.command(help=score.HELP, rich_help_panel=_CLIENT)(score.score)
app.add_typer(adapters.app, name="adapters", rich_help_panel=_CLIENT)
app.command(help=info.HELP, rich_help_panel=_CLIENT)(info.info)


def main() -> None:
    """Entry point of the ``manyhats`` script."""
    # gRPC's own log lines would mix with a command's output; its errors are reported in ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    restart_with_steady_heap(sys.argv[1:])
    app(prog_name="manyhats")
