"""``manyhats score``: how likely continuations are."""

from __future__ import annotations

from typing import Annotated

import typer

from manyhats.cli.options import common as opt
from manyhats.cli.options.connection import Connection, connect, takes_connection
from manyhats.cli.terminal.output import print_json, print_table
from manyhats.cli.terminal.progress import shown_wait

HELP = """Print how likely each continuation is after the prompt, best first.

[bold]Examples[/bold]

  $ manyhats score "The capital of France is" " Paris" " Rome"

  $ manyhats score --task mood --json "A fine film." " happy" " sad"

The numbers are natural log-probabilities. A continuation follows the
prompt directly, so most begin with a space.
"""


@takes_connection
def score(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the continuations follow.")],
    continuations: Annotated[list[str], typer.Argument(metavar="CONTINUATION...", help="Texts to score.")],
    task: opt.Task = "",
    *,
    connection: Connection,
    as_json: opt.Json = False,
) -> None:
    """Print how likely each continuation is after the prompt."""
    with connect(connection) as client, shown_wait():
        result = client.score(prompt, continuations, task_id=task)
    if as_json:
        print_json(result)
        return
    scored = sorted(zip(continuations, result.scores, strict=True), key=lambda pair: -pair[1].logprob)
    rows = [
        (text, f"{item.logprob:.4f}", str(item.num_tokens), f"{item.logprob / max(item.num_tokens, 1):.4f}")
        for text, item in scored
    ]
    print_table(("continuation", "logprob", "tokens", "per token"), rows)
