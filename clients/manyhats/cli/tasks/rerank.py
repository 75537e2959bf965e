"""``manyhats rerank``: texts by their relevance to a query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.tasks.texts import TextFile, Texts, Truncate, texts_of, truncation
from manyhats.cli.terminal.failures import UsageError
from manyhats.cli.terminal.output import print_json, print_table
from manyhats.cli.terminal.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import RerankOptions

HELP = """Print texts by their relevance to a query, best first.

[bold]Examples[/bold]

  $ manyhats rerank --task docs "how to reset" --file docs.txt --top 5

  $ manyhats rerank --task docs "how to reset" "Hold the button." "Buy a hat."

The task's adapter has a head with one class.
"""
Task = Annotated[str, typer.Option("--task", "-t", metavar="TASK[@VERSION]", help="The task that ranks.")]
Top = Annotated[
    int | None, typer.Option("--top", metavar="N", min=1, help="Print the best N.", show_default="all")
]
RawScores = Annotated[bool, typer.Option("--raw-scores", help="Print logits instead of probabilities.")]


@takes_connection
def rerank(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What the texts may answer.")],
    texts: Texts = None,
    *,
    task: Task,
    file: TextFile = None,
    top: Top = None,
    raw_scores: RawScores = False,
    truncate: Truncate = False,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Print texts by their relevance to a query."""
    if not query:
        raise UsageError("QUERY must not be empty")
    given = texts_of(texts, file)
    options: RerankOptions = {
        "raw_scores": raw_scores,
        "top_n": top,
        "return_texts": as_json,
        "truncation": truncation(truncate),
    }
    with connect(connection) as client, shown_wait():
        found = client.rerank(query, given, task_id=task, **options)
    if as_json:
        print_json(found)
        return
    print_table(("score", "text"), [(f"{each.score:.4f}", given[each.index]) for each in found.results])
