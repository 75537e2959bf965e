"""Asks every example task at once: ``python -m examples.mixed_call [HOST:PORT]``, while ``make run`` serves them.

All calls are in flight together, so that adapters of all methods share the engine's steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhats.client import DEFAULT_TARGET, AsyncClient, Generation, ManyhatsError, UnavailableError

PROMPTS = Path(__file__).with_name("prompts.json")


def main() -> None:
    """Print each task's method, version and answer."""
    parser = argparse.ArgumentParser(description="Ask every example task at once.")
    parser.add_argument("server", nargs="?", default=DEFAULT_TARGET, help="host:port (%(default)s)")
    server: str = parser.parse_args().server
    prompts: Mapping[str, Mapping[str, Any]] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    began_s = time.perf_counter()
    try:
        rows = asyncio.run(ask_all(server, prompts))
    except UnavailableError as error:
        sys.exit(f"error: {error}; `make run` says `ready` when it can be asked")
    except ManyhatsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print("\n".join(table(rows)))
    print(f"\n{len(rows)} tasks answered in {time.perf_counter() - began_s:.1f} s")


async def ask_all(server: str, prompts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One prompt per task, concurrently: task, method, version and answer of each."""
    async with AsyncClient(server) as client:
        return await asyncio.gather(*(ask(client, task, prompt) for task, prompt in prompts.items()))


async def ask(client: AsyncClient, task: str, prompt: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """One call, and what kind of adapter answered it."""
    answer: Generation = await client.generate(
        [{"role": "user", "content": prompt["chat"]}],
        task_id=task,
        temperature=0,
        max_new_tokens=prompt["max_new_tokens"],
    )
    if answer.adapter is None:
        raise RuntimeError(f"{task}: the base answered")
    adapter = await client.get_adapter(f"{task}@{answer.adapter.version}")
    return task, adapter.method, str(adapter.version), answer.text


def table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Lines of columns."""
    lines = [("task", "method", "version", "answer"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(line[:3], widths, strict=True)), line[3]])
        for line in lines
    ]


if __name__ == "__main__":
    main()
