"""``manyhats embed``: a vector of each text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.tasks.texts import TextFile, Texts, Truncate, batches, texts_of, truncation
from manyhats.cli.terminal.failures import CommandError, UsageError
from manyhats.cli.terminal.output import print_json
from manyhats.cli.terminal.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import EmbedOptions

HELP = """Print a vector of each text, a JSON list in each line.

[bold]Examples[/bold]

  $ manyhats embed --task news "A text" "Another"

  $ manyhats embed --file texts.txt --pooling mean --output vectors.npy

  $ manyhats embed --task news --file texts.txt --output vectors.jsonl

A file .npy holds one array for NumPy, a file .jsonl a JSON object for
each text. With --json there is one object for each 256 texts.
"""
Pooling = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        metavar="first|last|mean|max",
        help="What is read of a text's hidden values.",
        show_default="as the task says, else as the base model does",
    ),
]
Normalize = Annotated[
    bool, typer.Option("--normalize/--no-normalize", help="Whether vectors are divided by their length.")
]
Dimensions = Annotated[
    int | None,
    typer.Option(
        "--dimensions",
        metavar="N",
        min=1,
        help="Keep the first N values of each vector.",
        show_default="all of them",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the vectors to a file: .npy or .jsonl."),
]
_SUFFIXES = (".npy", ".jsonl")


@takes_connection
def embed(
    texts: Texts = None,
    file: TextFile = None,
    task: opt.Task = "",
    pooling: Pooling = None,
    normalize: Normalize = True,
    dimensions: Dimensions = None,
    truncate: Truncate = False,
    output: Output = None,
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Print a vector of each text."""
    if output is not None and output.suffix not in _SUFFIXES:
        raise UsageError(f"--output must end in {' or '.join(_SUFFIXES)}, not {output.name!r}")
    if output is not None and as_json:
        raise UsageError("--output takes the place of --json")
    given = texts_of(texts, file)
    options: EmbedOptions = {
        "pooling": pooling,
        "normalize": normalize,
        "dimensions": dimensions,
        "truncation": truncation(truncate),
    }
    vectors: list[list[float]] = []
    with connect(connection) as client, shown_wait() as show:
        for batch in batches(given):
            found = client.embed(batch, task_id=task, **options)
            if as_json:
                print_json(found, indent=2 if len(batch) == len(given) else None)
            elif output is None:
                for vector in found.values:
                    typer.echo(json.dumps(_shortened(vector)))
            else:
                vectors += found.values
                show(f"{len(vectors)} of {len(given)} texts")
    if output is not None:
        _write(output, given, vectors)


def _shortened(vector: Sequence[float]) -> list[float]:
    """The same numbers in float32, with no more digits than those have."""
    return [float(f"{value:.9g}") for value in vector]


def _write(path: Path, texts: Sequence[str], vectors: Sequence[list[float]]) -> None:
    try:
        if path.suffix == ".npy":
            numpy = import_module("numpy")
            numpy.save(path, numpy.array(vectors, dtype="float32"))
            return
        with path.open("w", encoding="utf-8") as file:
            for text, vector in zip(texts, vectors, strict=True):
                line = {"text": text, "embedding": _shortened(vector)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except ImportError as error:
        raise CommandError("a file .npy needs NumPy, which is not installed; .jsonl does not") from error
    except OSError as error:
        raise CommandError(f"cannot write {str(path)!r}: {error}") from error
