"""How a command fails: one clear line on stderr, and an exit code.

0 success, 1 the command failed, 2 it was called wrongly, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandError(typer.TyperException):
    """A command that cannot do what it was asked; the message is shown to the user unchanged."""

    exit_code = EXIT_FAILED


class UsageError(CommandError):
    """A command that was called wrongly in a way that Typer itself could not detect."""

    exit_code = EXIT_USAGE


class Commands(TyperGroup):
    """The group of all commands, which prints every failure as ``error: …``, without a traceback.

    Typer's own printing of errors (usage, hint, box) spans several lines, so it is not used. With
    ``MANYHATS_DEBUG=1`` an unexpected error shows its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interrupt ends it with the word ``interrupted``."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit the process with its code."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            print_error(_with_hint(error))
            code = error.exit_code
        except typer.Abort:
            code = EXIT_FAILED
        except Exception as error:  # noqa: BLE001 - the last resort: a bug must not look like anything else
            _print_unexpected(error)
            code = EXIT_FAILED
        sys.exit(code if isinstance(code, int) else 0)


def command_group(text: str) -> typer.Typer:
    """A group of commands below ``manyhats``."""
    return typer.Typer(
        cls=Commands,
        help=text,
        callback=help_without_command,
        invoke_without_command=True,
        rich_markup_mode="rich",
    )


def help_without_command(context: typer.Context) -> None:
    """Callback of a group: called without a command, it shows its help and fails."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


def print_error(message: str) -> None:
    """Print ``error: …`` on stderr, as one line."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def _with_hint(error: typer.TyperException) -> str:
    """The error's message, with a pointer to the help if Typer found the command called wrongly."""
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    return f"{error.format_message().rstrip('.')} (see `{context.command_path} --help`)"


def _print_unexpected(error: Exception) -> None:
    if os.environ.get("MANYHATS_DEBUG"):
        traceback.print_exception(error)
    print_error(f"unexpected {type(error).__name__}: {error} (MANYHATS_DEBUG=1 shows where)")
