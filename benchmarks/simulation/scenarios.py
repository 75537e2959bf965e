"""What is simulated: loads on one replica, and what each is to show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from benchmarks.simulation.events import Events
from benchmarks.simulation.machine import Machine
from benchmarks.simulation.measures import Answers, Shares
from benchmarks.simulation.replica import Call, Replica, Watch
from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart
from manyhats.engine.config import EngineConfig
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.sequence import Sequence as Waiting
from manyhats.load.workload import Arrival, Workload, arrivals

MACHINE = Machine()
BANDS = (10, 100, 1000, 10_000)
"""The last rank of each band of tasks whose times are told apart, the most popular 1."""
SHORT = Workload(popularity="zipf", prompt_tokens=(16, 64), answer_tokens=(4, 24))
"""Of such requests, one replica answers 46 a second over 10,000 tasks."""
LARGEST_COST = 64 * 1.0 + 24 * 2.0


@dataclass(frozen=True, slots=True)
class Found:
    """Of one run.

    Attributes:
        answers: ends, and times to first tokens.
        simulated_s: from the first arrival to the last end.
        scheduling_us: processor time of the scheduler, a request.
        step_us: the same, a step.
        most_waiting: sequences that waited in the scheduler at a time.
        num_loads, num_evictions, num_slot_evictions: of adapters.
        shares: what was seen of shares; None if they were not watched.
    """

    answers: Answers
    simulated_s: float
    scheduling_us: float
    step_us: float
    most_waiting: int
    num_loads: int
    num_evictions: int
    num_slot_evictions: int
    shares: Shares | None = None


class _Watches(Watch):
    """Tells several."""

    def __init__(self, *watches: Watch) -> None:
        self._watches = watches

    def queued(self, sequence: Waiting) -> None:
        for watch in self._watches:
            watch.queued(sequence)

    def stepped(self, schedule: Schedule) -> None:
        for watch in self._watches:
            watch.stepped(schedule)

    def ended(self, call: Call) -> None:
        for watch in self._watches:
            watch.ended(call)


class LeftOverError(Exception):
    """Something was still held when every call had ended."""


def task_names(num_tasks: int) -> list[str]:
    """Of tasks, the most popular first."""
    return [f"task{index:05}" for index in range(num_tasks)]


def run(
    loads: Sequence[tuple[Workload, Sequence[str]]],
    *,
    config: EngineConfig,
    machine: Machine = MACHINE,
    bands: Sequence[int] = BANDS,
    shares: Shares | None = None,
) -> Found:
    """Put loads on a replica, each on tasks of its own, and wait for all of it.

    Raises:
        UnfairError: shares went too far apart.
        LeftOverError: something is left.
    """
    names = [name for _, tasks in loads for name in tasks]
    answers = Answers({name: rank for rank, name in enumerate(names)}, bands)
    events = Events()
    replica = Replica(
        events,
        {name: record(name, number) for number, name in enumerate(names)},
        machine=machine,
        config=config,
        watch=answers if shares is None else _Watches(answers, shares),
    )
    most_waiting = num_asked = 0

    def ask(deadline_s: float | None, arrival: Arrival) -> None:
        nonlocal most_waiting, num_asked
        num_asked += 1
        replica.ask(arrival, deadline_s)
        most_waiting = max(most_waiting, replica.scheduler.num_waiting)

    for workload, tasks in loads:
        feed(events, arrivals(workload, tasks), partial(ask, workload.deadline_s))
    events.run()
    check_nothing_left(replica)
    if num_asked != answers.outcomes.total():
        raise LeftOverError(f"{num_asked} were asked, and {answers.outcomes.total()} have ended")
    stats = replica.residency.stats
    return Found(
        answers,
        events.now_s,
        1e6 * replica.scheduling.seconds / num_asked,
        1e6 * replica.scheduling.seconds / max(1, replica.scheduling.num_steps),
        most_waiting,
        stats.num_loads,
        stats.num_evictions,
        stats.num_slot_evictions,
        shares,
    )


def feed(events: Events, planned: Iterator[Arrival], ask: Callable[[Arrival], None]) -> None:
    """Have requests come when they are due; only the next is known, since there may be a million."""

    def come(arrival: Arrival) -> None:
        ask(arrival)
        plan()

    def plan() -> None:
        arrival = next(planned, None)
        if arrival is not None:
            events.after(arrival.at_s - events.now_s, lambda: come(arrival))

    plan()


def record(task: str, number: int) -> AdapterRecord:
    """A task's only version."""
    digest = f"sha256:{number:064x}"
    return AdapterRecord(
        task_id=task,
        version=1,
        digest=digest,
        method=AdapterMethod.LORA,
        state=AdapterState.ACTIVE,
        parts=(ArtifactPart(digest, 1.0, task),),
        size_bytes=MACHINE.adapter_bytes,
        num_parameters=0,
        source="",
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )


def check_nothing_left(replica: Replica) -> None:
    """Raises LeftOverError: a replica with nothing to do holds something."""
    scheduler = replica.scheduler
    left: Mapping[str, int] = {
        "calls": replica.num_unfinished,
        "running": scheduler.num_running,
        "waiting": scheduler.num_waiting,
        "blocks": scheduler.allocator.num_used,
        "leases": sum(map(replica.residency.in_use, replica.records.values())),
    }
    if any(left.values()):
        raise LeftOverError(f"left when all had ended: {left}")


def popular(num_requests: int, num_tasks: int = 10_000, *, num_slots: int = 256, budget: int = 200) -> Found:
    """Requests by Zipf's law at 0.87 of what the replica can answer; ``budget`` adapters fit in host memory."""
    rate = 40.0
    workload = replace(SHORT, rate=rate, duration_s=num_requests / rate)
    return run([(workload, task_names(num_tasks))], config=config_of(num_slots, budget))


def overload(num_requests: int, num_tasks: int = 10_000, window: int = 500) -> Found:
    """Six times what the replica can answer, of which the queue holds 20,000; loads take no time."""
    rate = 300.0
    workload = replace(SHORT, rate=rate, duration_s=num_requests / rate)
    return run(
        [(workload, task_names(num_tasks))],
        config=config_of(256, num_tasks, max_waiting=20_000),
        machine=replace(MACHINE, load_s=0.0),
        shares=Shares(LARGEST_COST, window),
    )


def quiet_first_ms(neighbour_rate: float, duration_s: float, rate: float = 1.0) -> float:
    """The 95th percentile of a quiet task's time to first token beside a neighbour that asks for so much a second.

    With prompts of 16 to 128 tokens and answers of 16 to 64 it answers 24 a second: the neighbour's half is 12.
    """
    load = Workload(rate=rate, duration_s=duration_s, seed=1)
    other = replace(load, rate=neighbour_rate, seed=2)
    found = run([(load, ["quiet"]), (other, ["other"])], config=config_of(64, 64), bands=(1, 2))
    return found.answers.first_ms((95,))[0][1][0]


def config_of(num_slots: int, budget: int, max_waiting: int = 1024) -> EngineConfig:
    """A server with memory for ``budget`` adapters."""
    return EngineConfig(
        max_loaded_adapters=num_slots,
        max_adapter_bytes=budget * MACHINE.adapter_bytes,
        max_waiting=max_waiting,
    )


def processor_s(simulate: Callable[[], Found]) -> tuple[Found, float]:
    """What was found, and the processor time that finding it took."""
    began = time.process_time()
    return simulate(), time.process_time() - began
