"""How often a served task is right: ``python -m examples.served_accuracy TASK --data eval.jsonl``.

Each row's prompt goes to a running server's ``Score`` with every distinct completion of the file and its end; the
likeliest one is the answer. It is the measure that ``manyhats train --label auto`` reports of the artifact, taken from
outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from manyhats.client import DEFAULT_TARGET, AsyncClient

DEFAULT_END = "<|im_end|>"
"""Of the default base."""

_IN_FLIGHT = 64


def main() -> None:
    """Print how many answers of the task are right."""
    parser = argparse.ArgumentParser(description="Score a served task on rows with prompt and completion.")
    parser.add_argument("task", help="as registered, such as wordnet or wordnet@2; base for the base model")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--end", default=DEFAULT_END, metavar="TEXT", help="what the base ends an answer with; %(default)s"
    )
    parser.add_argument("--server", default=DEFAULT_TARGET, metavar="HOST:PORT")
    arguments = parser.parse_args()
    with arguments.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    task_id = "" if arguments.task == "base" else arguments.task
    num_right = asyncio.run(count_right(arguments.server, task_id, rows, end=arguments.end))
    print(f"{arguments.task}: {num_right} of {len(rows)} right, {100 * num_right / len(rows):.1f} %")


async def count_right(
    server: str, task_id: str, rows: Sequence[Mapping[str, str]], *, end: str = DEFAULT_END
) -> int:
    """How many rows' completions the task finds likelier than all others of the rows.

    The end belongs to a completion, so that one that begins another can be told from it.
    """
    labels = sorted({row["completion"] for row in rows})
    continuations = [label if label.endswith(end) else label + end for label in labels]
    room = asyncio.Semaphore(_IN_FLIGHT)

    async def is_right(client: AsyncClient, row: Mapping[str, str]) -> bool:
        async with room:
            result = await client.score(row["prompt"], continuations, task_id=task_id)
        logprobs = [score.logprob for score in result.scores]
        return labels[logprobs.index(max(logprobs))] == row["completion"]

    async with AsyncClient(server) as client:
        return sum(await asyncio.gather(*(is_right(client, row) for row in rows)))


if __name__ == "__main__":
    main()
