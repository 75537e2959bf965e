"""What is asked of a server, and when: an open loop, in which requests come whether or not others were answered."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Popularity = Literal["uniform", "zipf", "skewed", "cold", "greedy"]
POPULARITIES: tuple[Popularity, ...] = ("uniform", "zipf", "skewed", "cold", "greedy")
_SKEW = 50
"""The first task of a skewed load asks for this many times what each other one does, and that of a greedy one, in the
second half, for this many times what it did in the first."""
_NORMAL = 4
"""In the first half the first task of a greedy load asks for this many times what all others do together."""
_TEXT = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so"
)
"""Each word is a token in the vocabularies of English models, so that a prompt has about as many tokens as words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A load.

    Attributes:
        rate: requests a second, on average; they come as a Poisson process. Of a greedy load, in its first half.
        duration_s: for how long they come.
        popularity: how they spread over tasks: alike; by Zipf's law, the r-th task in proportion to 1 / r; the first
            50 times as often as each other; each task in turn, so that all are cold that do not fit in memory; or the
            first four times as often as all others together, and in the second half 50 times as often as before.
        prompt_tokens, answer_tokens: the least and the most of a request; each length between is as likely.
        cancel_share: how many callers of all leave, each somewhere in the middle of its answer.
        swap_every_s: how often a task is moved to another of its versions; 0 for never.
        deadline_s: of each request; None for none.
        seed: makes arrivals, tasks, prompts and lengths the same again.
    """

    rate: float = 2.0
    duration_s: float = 30.0
    popularity: Popularity = "uniform"
    prompt_tokens: tuple[int, int] = (16, 128)
    answer_tokens: tuple[int, int] = (16, 64)
    cancel_share: float = 0.0
    swap_every_s: float = 0.0
    deadline_s: float | None = None
    seed: int = 0


PRESETS: dict[str, Workload] = {
    "steady": Workload(),
    "zipf": Workload(popularity="zipf", rate=4.0, duration_s=60.0),
    "greedy": Workload(
        popularity="greedy",
        rate=4.0,
        duration_s=240.0,
        prompt_tokens=(64, 192),
        answer_tokens=(64, 256),
        deadline_s=60.0,
    ),
    "cold": Workload(popularity="cold", rate=5.0, duration_s=60.0),
    "overload": Workload(popularity="zipf", rate=30.0, duration_s=300.0, deadline_s=30.0),
    "churn": Workload(popularity="zipf", rate=4.0, duration_s=60.0, cancel_share=0.3, swap_every_s=2.0),
}
"""Loads by name; ``replace`` changes what is said otherwise."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at_s: when it comes, after the beginning.
        task: that it is for.
        prompt: its text.
        num_tokens: of its answer.
        cancel_after: pieces of the answer after which its caller leaves; None if it stays.
    """

    at_s: float
    task: str
    prompt: str
    num_tokens: int
    cancel_after: int | None = None


def arrivals(workload: Workload, tasks: Sequence[str]) -> Iterator[Arrival]:
    """The requests of a load on these tasks, in order; the same for the same arguments."""
    rng = random.Random(workload.seed)
    words = _TEXT.split()
    chosen = _tasks(workload, tasks, rng)
    for at_s in _moments(workload, rng):
        num_tokens = rng.randint(*workload.answer_tokens)
        leaves = rng.random() < workload.cancel_share
        yield Arrival(
            at_s=at_s,
            task=chosen(at_s),
            prompt=" ".join(rng.choices(words, k=rng.randint(*workload.prompt_tokens))),
            num_tokens=num_tokens,
            cancel_after=rng.randint(1, num_tokens) if leaves else None,
        )


def _moments(workload: Workload, rng: random.Random) -> Iterator[float]:
    """When requests come."""
    phases = [(0.0, workload.duration_s, workload.rate)]
    if workload.popularity == "greedy":
        half_s, rate = workload.duration_s / 2, workload.rate
        phases = [
            (0.0, half_s, rate),
            (half_s, workload.duration_s, rate * (_SKEW * _NORMAL + 1) / (_NORMAL + 1)),
        ]
    for begin_s, end_s, rate in phases:
        at_s = begin_s + rng.expovariate(rate)
        while at_s < end_s:
            yield at_s
            at_s += rng.expovariate(rate)


def _tasks(workload: Workload, tasks: Sequence[str], rng: random.Random) -> Callable[[float], str]:
    """The task of a request that comes at a time."""
    if workload.popularity == "cold":
        turns = itertools.cycle(tasks)
        return lambda at_s: next(turns)
    if workload.popularity == "greedy":
        first, *others = tasks

        def chosen(at_s: float) -> str:
            weight = _NORMAL * (_SKEW if at_s >= workload.duration_s / 2 else 1)
            return rng.choice(others) if others and rng.random() * (weight + 1) < 1 else first

        return chosen
    cumulated = list(itertools.accumulate(_weights(workload.popularity, len(tasks))))
    return lambda at_s: rng.choices(tasks, cum_weights=cumulated)[0]


def _weights(popularity: Popularity, num_tasks: int) -> list[float]:
    match popularity:
        case "zipf":
            return [1 / rank for rank in range(1, num_tasks + 1)]
        case "skewed":
            return [float(_SKEW), *[1.0] * (num_tasks - 1)]
        case _:
            return [1.0] * num_tasks
