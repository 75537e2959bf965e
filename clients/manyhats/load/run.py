"""Makes a load on a server and notes what came of each request."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from manyhats.client import AsyncClient, ManyhatsError
from manyhats.load.workload import Arrival, Workload, arrivals

OK = "OK"
LEFT = "LEFT"
"""The outcome of a request whose caller left, as it was to."""

Progress = Callable[[int, int], None]
"""Called with how many requests have come and how many have ended."""


@dataclass(slots=True)
class Answer:
    """What came of one request; times are in seconds after the beginning.

    Attributes:
        task: that it was for.
        due_s: when it was to come. Latencies count from here, so that a client that falls behind hides nothing.
        pieces_s: when each piece of the answer came.
        num_tokens: of all pieces.
        ended_s: when it ended.
        outcome: ``OK``, ``LEFT``, or the reason why it failed.
    """

    task: str
    due_s: float
    pieces_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    ended_s: float = 0.0
    outcome: str = OK

    @property
    def first_s(self) -> float:
        """How long the first piece took; infinite if none came."""
        return self.pieces_s[0] - self.due_s if self.pieces_s else float("inf")

    @property
    def gaps_s(self) -> list[float]:
        """Between pieces."""
        return [after - before for before, after in itertools.pairwise(self.pieces_s)]


async def run_load(
    client: AsyncClient,
    workload: Workload,
    tasks: Sequence[str],
    versions: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = lambda num_come, num_ended: None,
) -> list[Answer]:
    """Send every request when it is due, and wait for all of them.

    Args:
        client: of the server, without retries, which would hide refusals.
        workload: what to ask.
        tasks: the most popular first; an empty name is the base model.
        versions: of the tasks that may be moved to another of theirs.
        progress: told of each request's beginning and end.

    Returns:
        What came of each, in the order in which they were due.
    """
    planned = list(arrivals(workload, tasks))
    answers = [Answer(arrival.task, arrival.at_s) for arrival in planned]
    began_s = time.perf_counter()
    num_ended = 0

    async def one(arrival: Arrival, answer: Answer, num_come: int) -> None:
        nonlocal num_ended
        await ask(client, arrival, answer, began_s, workload.deadline_s)
        num_ended += 1
        progress(num_come, num_ended)

    swaps = asyncio.create_task(_swap(client, workload, versions or {}))
    try:
        async with asyncio.TaskGroup() as running:
            for count, (arrival, answer) in enumerate(zip(planned, answers, strict=True), 1):
                await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
                progress(count, num_ended)
                running.create_task(one(arrival, answer, count))
    finally:
        swaps.cancel()
        await asyncio.gather(swaps, return_exceptions=True)
    return answers


async def ask(
    client: AsyncClient, arrival: Arrival, answer: Answer, began_s: float, deadline_s: float | None
) -> None:
    """Send one request now, and note in ``answer`` what comes of it.

    Args:
        client: of the server.
        arrival: what to ask.
        answer: times in it count from ``began_s``, on the clock of ``time.perf_counter``.
        began_s: see there.
        deadline_s: of the request; None for none.
    """
    try:
        stream = client.generate_stream(
            arrival.prompt,
            task_id=arrival.task,
            timeout_s=deadline_s,
            max_new_tokens=arrival.num_tokens,
            ignore_eos=True,
            temperature=0,
        )
        async with stream:
            async for piece in stream:
                answer.pieces_s.append(time.perf_counter() - began_s)
                answer.num_tokens += len(piece.tokens)
                if arrival.cancel_after is not None and len(answer.pieces_s) >= arrival.cancel_after:
                    answer.outcome = LEFT
                    break
    except ManyhatsError as error:
        answer.outcome = error.reason or error.code or type(error).__name__
    answer.ended_s = time.perf_counter() - began_s


async def _swap(client: AsyncClient, workload: Workload, versions: Mapping[str, Sequence[int]]) -> None:
    """Move tasks with several versions from one to another, until cancelled."""
    rng = random.Random(workload.seed)
    movable = [task for task, numbers in versions.items() if len(numbers) > 1]
    if not (workload.swap_every_s and movable):
        return
    while True:
        await asyncio.sleep(workload.swap_every_s)
        task = rng.choice(movable)
        # What cannot be moved now, as while the server is too busy, is moved the next time.
        try:
            await client.activate_adapter(f"{task}@{rng.choice(versions[task])}")
        except ManyhatsError:
            continue
