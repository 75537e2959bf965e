"""Asks all the encoder's tasks at once: ``python -m examples.encoder.mixed_call [HOST:PORT]``.

All calls are in flight together, so that adapters of all methods share a step, while ``make run-encoder`` serves them.
For ``concierge`` the hotel's notes are read along with the question, and the one whose vector is nearest is the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping

from examples.encoder.calls import EncoderCall, read_calls
from examples.encoder.concierge import notes
from examples.mixed_call import table
from manyhats.client import DEFAULT_TARGET, AsyncClient, ManyhatsError, UnavailableError


def main() -> None:
    """Print each task's method, version and answer."""
    parser = argparse.ArgumentParser(description="Ask all the encoder's tasks at once.")
    parser.add_argument("server", nargs="?", default=DEFAULT_TARGET, help="host:port (%(default)s)")
    server: str = parser.parse_args().server
    try:
        rows = asyncio.run(ask_all(server, read_calls()))
    except UnavailableError as error:
        sys.exit(f"error: {error}; `make run-encoder` says `ready` when it can be asked")
    except ManyhatsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print("\n".join(table(rows)))


async def ask_all(server: str, calls: Mapping[str, EncoderCall]) -> list[tuple[str, str, str, str]]:
    """Each task's call, concurrently: task, method, version and answer."""
    async with AsyncClient(server) as client:
        return await asyncio.gather(*(_ask(client, task, call) for task, call in calls.items()))


async def _ask(client: AsyncClient, task: str, call: EncoderCall) -> tuple[str, str, str, str]:
    answer = await _ANSWERS[call.command](client, task, call.text)
    adapter = await client.get_adapter(task)
    return task, adapter.method, str(adapter.version), answer


async def classify(client: AsyncClient, task: str, text: str) -> str:
    """The best class, and its probability."""
    best = (await client.classify([text], task_id=task)).results[0].classes[0]
    return f"{best.label} ({best.score:.2f})"


async def tag(client: AsyncClient, task: str, text: str) -> str:
    """The entities."""
    found = (await client.tag([text], task_id=task)).results[0].entities
    return ", ".join(f"{entity.label} {entity.text}" for entity in found)


async def nearest_note(client: AsyncClient, task: str, question: str) -> str:
    """The note with the largest cosine to the question, and the cosine."""
    found = await client.embed([question, *notes()], task_id=task)
    asked, *vectors = found.values
    cosines = [sum(a * b for a, b in zip(asked, vector, strict=True)) for vector in vectors]
    best = max(range(len(cosines)), key=cosines.__getitem__)
    return f"{notes()[best]} ({cosines[best]:.2f})"


_ANSWERS = {"classify": classify, "tag": tag, "embed": nearest_note}


if __name__ == "__main__":
    main()
