"""The ``manyhats`` command. Nothing heavy is imported here; each command does so when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from manyhats.cli import bench, info, model, serve, token
from manyhats.cli.adapters import group as adapters
from manyhats.cli.doctor import command as doctor
from manyhats.cli.tasks import chat, classify, embed, generate, rerank, score, tag
from manyhats.cli.terminal.failures import Commands, help_without_command
from manyhats.cli.training import train

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

_VARIABLE = "GLIBC_TUNABLES"
# glibc keeps small freed chunks in separate lists, unmerged. Torch's tensors are aligned, and each leaves such a scrap
# beside it: the holes between scraps are too small for the next tensor of that size, and the heap grows by a layer's
# tensors at every layer. Without these lists it stays at what is in use; the speed is the same.
_TUNABLES = {"glibc.malloc.mxfast": "0", "glibc.malloc.tcache_count": "0"}

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
app.command(help=doctor.HELP, rich_help_panel=_SERVER)(doctor.doctor)
app.add_typer(model.app, name="model", rich_help_panel=_SERVER)
app.add_typer(token.app, name="token", rich_help_panel=_SERVER)
app.command(help=train.HELP, rich_help_panel=_TRAINER)(train.train)
app.command(help=generate.HELP, rich_help_panel=_CLIENT)(generate.generate)
app.command(help=chat.HELP, rich_help_panel=_CLIENT)(chat.chat)
app.command(help=score.HELP, rich_help_panel=_CLIENT)(score.score)
app.command(help=embed.HELP, rich_help_panel=_CLIENT)(embed.embed)
app.command(help=classify.HELP, rich_help_panel=_CLIENT)(classify.classify)
app.command(help=tag.HELP, rich_help_panel=_CLIENT)(tag.tag)
app.command(help=rerank.HELP, rich_help_panel=_CLIENT)(rerank.rerank)
app.add_typer(adapters.app, name="adapters", rich_help_panel=_CLIENT)
app.command(help=bench.HELP, rich_help_panel=_CLIENT)(bench.bench)
app.command(help=info.HELP, rich_help_panel=_CLIENT)(info.info)


def main() -> None:
    """Entry point of the ``manyhats`` script."""
    # gRPC's own log lines would mix with a command's output; its errors are reported in ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    restart_with_steady_heap(sys.argv[1:])
    app(prog_name="manyhats")


def restart_with_steady_heap(arguments: Sequence[str]) -> None:
    """Run the command again, in this process, with glibc's lists of small chunks off; once, and only for ``train``.

    They are read when a process starts. Without glibc, or if a user has set them, nothing happens.

    Args:
        arguments: of the command line, without the program.
    """
    if arguments[:1] != ["train"] or not _has_glibc():
        return
    given = os.environ.get(_VARIABLE, "")
    if any(name in given for name in _TUNABLES):
        return
    ours = ":".join(f"{name}={value}" for name, value in _TUNABLES.items())
    os.environ[_VARIABLE] = f"{given}:{ours}" if given else ours
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):
        return False
