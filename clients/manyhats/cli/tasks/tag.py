"""``manyhats tag``: the entities in each text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.tasks.texts import TextFile, Texts, Truncate, batches, texts_of, truncation
from manyhats.cli.terminal.output import print_json, print_table
from manyhats.cli.terminal.progress import shown_wait

if TYPE_CHECKING:
    from manyhats.client import TaggedText, TagOptions

HELP = """Print the entities in each text by a task whose adapter has a head for tokens.

[bold]Examples[/bold]

  $ manyhats tag --task ner "John lives in London."

  $ manyhats tag --task ner --aggregation first --file news.txt

  $ manyhats tag --task ner --aggregation none "John lives in London."

With --aggregation none every token is printed with its best class. start
and end count characters. With --json there is one object for each 256
texts.
"""
Task = Annotated[
    str, typer.Option("--task", "-t", metavar="TASK[@VERSION]", help="The task that classifies tokens.")
]
Aggregation = Annotated[
    str,
    typer.Option(
        "--aggregation",
        metavar="simple|first|max|none",
        help="Each token has its own class, or a word has that of its first token, or of its surest.",
    ),
]


@takes_connection
def tag(
    texts: Texts = None,
    *,
    task: Task,
    file: TextFile = None,
    aggregation: Aggregation = "simple",
    truncate: Truncate = False,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Print the entities in each text."""
    given = texts_of(texts, file)
    rows: list[tuple[str, ...]] = []
    num_read = 0
    # Of tokens, the table shows the best class alone.
    options: TagOptions = {
        "aggregation": aggregation,
        "top_k": 1 if aggregation == "none" and not as_json else None,
        "truncation": truncation(truncate),
    }
    with connect(connection) as client, shown_wait() as show:
        for batch in batches(given):
            found = client.tag(batch, task_id=task, **options)
            if as_json:
                print_json(found, indent=2 if len(batch) == len(given) else None)
                continue
            for text, tagged in zip(batch, found.results, strict=True):
                num_read += 1
                rows += [(str(num_read), *row) for row in _rows(text, tagged)]
            show(f"{num_read} of {len(given)} texts")
    if as_json:
        return
    columns, first = ("text", "part", "class", "score", "start", "end"), 0 if len(given) > 1 else 1
    print_table(columns[first:], [row[first:] for row in rows])


def _rows(text: str, tagged: TaggedText) -> list[tuple[str, ...]]:
    found = [(each.text, each.label, each.score, each.start, each.end) for each in tagged.entities]
    for token in tagged.tokens:
        best = token.classes[0]
        found.append((text[token.start : token.end], best.label, best.score, token.start, token.end))
    return [(part, label, f"{score:.4f}", str(start), str(end)) for part, label, score, start, end in found]
