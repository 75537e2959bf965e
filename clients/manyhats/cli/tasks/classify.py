"""``manyhats classify``: the class of each text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.tasks.texts import TextFile, Texts, Truncate, batches, texts_of, truncation
from manyhats.cli.terminal.output import print_json, print_table
from manyhats.cli.terminal.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import ClassifyOptions

HELP = """Print the class of each text by a task whose adapter has a head.

[bold]Examples[/bold]

  $ manyhats classify --task sentiment "The cake was dry."

  $ manyhats classify --task sentiment --task topic --all "The cake was dry."

  $ manyhats classify --task sentiment --file reviews.txt

With --json there is one object for each 256 texts.
"""
Tasks = Annotated[
    list[str],
    typer.Option("--task", "-t", metavar="TASK[@VERSION]", help="Classify as this task. Repeatable."),
]
All = Annotated[bool, typer.Option("--all", help="Print every class, not only the best.")]
RawScores = Annotated[bool, typer.Option("--raw-scores", help="Print logits instead of probabilities.")]


@takes_connection
def classify(
    texts: Texts = None,
    *,
    task: Tasks,
    file: TextFile = None,
    shows_all: All = False,
    raw_scores: RawScores = False,
    truncate: Truncate = False,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Print the class of each text."""
    given = texts_of(texts, file)
    options: ClassifyOptions = {
        "raw_scores": raw_scores,
        "top_k": 0 if shows_all else 1,
        "truncation": truncation(truncate),
    }
    rows: list[tuple[str, ...]] = []
    with connect(connection) as client, shown_wait() as show:
        for batch in batches(given):
            found = client.classify(batch, task_id=task, **options)
            if as_json:
                print_json(found, indent=2 if len(batch) == len(given) else None)
                continue
            for index, result in enumerate(found.results):
                text, name = batch[index // len(task)], task[index % len(task)]
                rows += [(text, name, each.label, f"{each.score:.4f}") for each in result.classes]
            show(f"{len(rows)} classes")
    if as_json:
        return
    if len(rows) == 1:
        typer.echo("\t".join(rows[0][2:]))
        return
    columns = ("text", "task", "class", "score")
    shown = [index for index in range(4) if (index or len(given) > 1) and (index != 1 or len(task) > 1)]
    print_table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows])
