"""The prompts of a file, and their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from manyhats.cli.options.connection import describe
from manyhats.cli.tasks.texts import lines_of
from manyhats.cli.terminal.failures import CommandError, UsageError
from manyhats.cli.terminal.output import print_json
from manyhats.cli.terminal.progress import Report, shown_progress

if TYPE_CHECKING:
    from manyhats.client import Client, GenerateOptions, Generation, ManyhatsError, Prompt

# Answers are printed when so many are there.
_AT_A_TIME = 1024
_KEYS = ("prompt", "messages")


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt of a file: the number of its line, and the task that it is for."""

    line: int
    prompt: Prompt
    task: str


def rows_of(file: Path, task: str, as_prompt: Callable[[str], Prompt]) -> list[Row]:
    """The prompts of a file: its lines, or with the suffix ``.jsonl`` what its objects have.

    Args:
        file: "-" is stdin.
        task: of a line that names none.
        as_prompt: makes a prompt of a text.

    Raises:
        UsageError: it cannot be read, has no prompt, or a line of it is none.
    """
    lines = lines_of(file)
    if file.suffix == ".jsonl":
        rows = [_row(number, line, task, as_prompt) for number, line in lines]
    else:
        rows = [Row(number, as_prompt(line), task) for number, line in lines]
    if not rows:
        raise UsageError(f"--file: {file} has no prompt")
    return rows


def _row(number: int, line: str, task: str, as_prompt: Callable[[str], Prompt]) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UsageError(f"--file: line {number} is not JSON: {error}") from error
    given = [key for key in _KEYS if isinstance(fields, dict) and key in fields]
    if len(given) != 1 or not isinstance(fields[given[0]], str if given == ["prompt"] else list):
        raise UsageError(f"--file: line {number} must be an object with a text `prompt` or a list `messages`")
    own_task = fields.get("task", task)
    if not isinstance(own_task, str):
        raise UsageError(f"--file: line {number}: `task` must be a text")
    content = fields[given[0]]
    return Row(number, as_prompt(content) if isinstance(content, str) else content, own_task)


def answer_rows(
    client: Client, rows: list[Row], as_json: bool, options: GenerateOptions, concurrency: int | None
) -> None:
    """Print the answers in the order of the rows; one that fails does not stop the others.

    Raises:
        CommandError: some failed; each has been reported.
    """
    client.server_info()  # of a server that is not there, say so at once instead of waiting until it comes back
    num_failed = 0
    with shown_progress() as report:
        for begin in range(0, len(rows), _AT_A_TIME):
            some = rows[begin : begin + _AT_A_TIME]
            answers = client.generate_many(
                [row.prompt for row in some],
                task_id=[row.task for row in some],
                on_error="return",
                concurrency=concurrency,
                progress=_counted_from(begin, len(rows), report),
                **options,
            )
            for index, (row, answer) in enumerate(zip(some, answers, strict=True), begin):
                num_failed += _print(row, answer, as_json, is_first=index == 0)
    if num_failed:
        raise CommandError(f"{num_failed} of {len(rows)} prompts failed")


def _counted_from(begin: int, total: int, report: Report) -> Callable[[int, int], None]:
    return lambda done, _: report("prompts", begin + done, total)


def _print(row: Row, answer: Generation | ManyhatsError, as_json: bool, *, is_first: bool) -> bool:
    """Print what became of a row; true if it failed."""
    from manyhats.client import ManyhatsError

    error, text = None, ""
    if isinstance(answer, ManyhatsError):
        error = {"error": answer.message, "reason": answer.reason}
        typer.echo(f"error: line {row.line}: {describe(answer)}", err=True)
    else:
        text = answer.text
    if as_json:
        print_json(error or answer, indent=None)
    else:
        typer.echo(text if is_first else f"---\n{text}")
    return error is not None
