"""Many replicas behind one router: how often adapters are loaded, and how long first tokens take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.simulation.events import Events
from benchmarks.simulation.measures import Answers
from benchmarks.simulation.replica import Call, Replica
from benchmarks.simulation.routing import Route
from benchmarks.simulation.scenarios import (
    MACHINE,
    SHORT,
    check_nothing_left,
    config_of,
    feed,
    record,
    task_names,
)
from manyhats.load.workload import Arrival, arrivals


@dataclass(frozen=True, slots=True)
class Spread:
    """What was seen once replicas had warmed up.

    Attributes:
        num_requests: that came.
        loads_per_s: of adapters from disk, over all replicas.
        hit_ratio: requests for each of which no adapter was loaded, of all.
        first_ms: percentiles of the time to first tokens.
        busiest: requests that went to the replica that got most, over the average.
    """

    num_requests: int
    loads_per_s: float
    hit_ratio: float
    first_ms: Sequence[float]
    busiest: float


class _Since(Answers):
    """Of calls that came at a time or later, all tasks together."""

    def __init__(self, since_s: float, tasks: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(tasks, 0), (1,))
        self._since_s = since_s

    def ended(self, call: Call) -> None:
        if call.came_s >= self._since_s:
            super().ended(call)


def spread(
    make_route: Callable[[Sequence[Replica], Callable[[], float]], Route],
    *,
    num_requests: int,
    num_tasks: int = 10_000,
    num_replicas: int = 100,
    rate: float = 30.0,
    budget: int = 200,
) -> Spread:
    """Requests by Zipf's law over all tasks, ``rate`` a second for each replica; the first half of them warms up.

    Args:
        make_route: of replicas and a clock, which replica a task's request goes to.
        num_requests: about so many, with the warm-up.
        num_tasks: that are registered.
        num_replicas: of one store.
        rate: of which each could answer 46.
        budget: adapters that fit in a replica's memory.

    Raises:
        LeftOverError: something is left on a replica.
    """
    duration_s = num_requests / (rate * num_replicas)
    workload = replace(SHORT, rate=rate * num_replicas, duration_s=duration_s)
    names = task_names(num_tasks)
    events = Events()
    records = {name: record(name, number) for number, name in enumerate(names)}
    answers = _Since(duration_s / 2, names)
    config = config_of(min(256, budget), budget)
    replicas = [
        Replica(events, records, machine=MACHINE, config=config, watch=answers) for _ in range(num_replicas)
    ]
    route = make_route(replicas, events.clock)
    asked = dict.fromkeys(replicas, 0)
    loads_before = 0

    def ask(arrival: Arrival) -> None:
        replica = route(arrival.task)
        asked[replica] += arrival.at_s >= duration_s / 2
        replica.ask(arrival)

    def warmed() -> None:
        nonlocal loads_before
        loads_before = _num_loads(replicas)

    feed(events, arrivals(workload, names), ask)
    events.after(duration_s / 2, warmed)
    events.run()
    for replica in replicas:
        check_nothing_left(replica)
    num_loads, num_asked = _num_loads(replicas) - loads_before, sum(asked.values())
    return Spread(
        num_asked,
        num_loads / (duration_s / 2),
        1 - num_loads / num_asked,
        answers.first_ms()[0][1],
        max(asked.values()) * num_replicas / num_asked,
    )


def _num_loads(replicas: Sequence[Replica]) -> int:
    return sum(replica.residency.stats.num_loads for replica in replicas)
