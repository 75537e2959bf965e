"""Texts that a command reads: given one by one, or as the lines of a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from manyhats.cli.terminal.failures import UsageError

# What one call takes at a time; the server would take more, but nothing would be seen until then.
_MAX_TEXTS = 256
_MAX_BYTES = 1024 * 1024

Texts: TypeAlias = Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="The texts.")]
TextFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="A text in each line that is not empty; - is stdin."),
]

Truncate: TypeAlias = Annotated[
    bool, typer.Option("--truncate", help="Cut the end off texts that are too long, instead of failing.")
]


def truncation(is_wanted: bool) -> str | None:
    """The client's option."""
    return "end" if is_wanted else None


def texts_of(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """The texts of a command, those of its file last.

    Raises:
        UsageError: there is none, one is empty, or the file cannot be read.
    """
    texts = list(given or ())
    if "" in texts:
        raise UsageError("TEXT must not be empty")
    if file is not None:
        texts += [line for _, line in lines_of(file)]
    if not texts:
        raise UsageError("there is no text; give TEXT, or --file")
    return texts


def lines_of(file: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers; "-" is stdin.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file: cannot read {str(file)!r}: {error}") from error
    # Not splitlines: a text may have other separators within.
    lines = content.replace("\r\n", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, as many at a time as one call takes."""
    batch: list[str] = []
    num_bytes = 0
    for text in texts:
        size = len(text.encode())
        if batch and (len(batch) == _MAX_TEXTS or num_bytes + size > _MAX_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(text)
        num_bytes += size
    yield batch
