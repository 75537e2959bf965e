"""A client for one command, whose errors become the command's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from manyhats.cli.failures import CommandError

if TYPE_CHECKING:
    from manyhats.client import Client, ManyhatsError


@contextmanager
def connect(server: str, timeout_s: float | None = None) -> Iterator[Client]:
    """A client of the server at ``server``.

    Raises:
        CommandError: for every ``ManyhatsError`` in the block.
    """
    from manyhats.client import Client, ManyhatsError

    with Client(server, timeout_s=timeout_s) as client:
        try:
            yield client
        except ManyhatsError as error:
            raise CommandError(describe(error)) from error


def describe(error: ManyhatsError) -> str:
    """The error's message, with what a person at a terminal can do about it."""
    from manyhats.client import QueueFullError, TaskNotFoundError, UnavailableError

    match error:
        case UnavailableError() if not error.reason:
            return f"{error}; is `manyhats serve` running there?"
        case QueueFullError(retry_after_s=float(seconds)):
            return f"{error}; try again in {seconds:g} s"
        case TaskNotFoundError():
            return f"{error}; `manyhats adapters list` shows what there is"
        case _:
            return str(error)
