"""The order in which tasks take turns, kept up to date by looking at few of them."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator

import pytest

from manyhats.adapters.reserved_labels import Entitlement
from manyhats.engine.scheduling.policy import Queue
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.shares import PROMPT_COST, Shares
from support.harnesses.scheduling import make_sequence


class PlainShares(Shares):
    """``Shares`` that looks at every task that waits."""

    def _lowest(self) -> float:
        counters = [self.counter(task) for task in self._waiting]
        return min(counters) if counters else self.counter(self._last_waiting)


def plain_order(queue: Queue) -> Iterator[Sequence]:
    """What ``Queue.__iter__`` says, by looking at everything; none of it starts meanwhile."""
    heads: list[tuple[int, bool, float, float, int, str, int]] = []
    served: dict[str, float] = {}
    may_come = queue._shares.num_tasks > 1

    def push(task: str, index: int) -> None:
        sequences = queue._lines[task].sequences
        if index < len(sequences):
            priority, begins, arrival, order = queue._waiting_rank(sequences[index])
            heapq.heappush(
                heads, (priority, begins, served[task] if begins else 0.0, arrival, order, task, index)
            )

    for task in queue._lines:
        served[task] = queue._shares.counter(task)
        push(task, 0)
    while heads:
        *_, task, index = heapq.heappop(heads)
        sequence = queue._lines[task].sequences[index]
        if queue._limits.held_until_s(sequence, may_come=may_come) < 0:
            yield sequence
            served[task] += PROMPT_COST * sequence.num_left / sequence.entitlement.share
        elif not queue._lines[task].num_continuations:
            continue
        push(task, index + 1)


class Trial:
    """Things that happen to a queue, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.queue = Queue(SchedulerConfig(max_num_batched_tokens=64), lambda: self.now_s)
        self.queue._shares = PlainShares() if self.rng.random() < 0.5 else Shares()
        self.running: list[Sequence] = []
        self.num_added = itertools.count()
        self.limits = {
            f"task {index}": Entitlement(
                self.rng.choice([0.5, 1.0, 3.0]),
                self.rng.choice([None, None, 1, 2]),
                self.rng.choice([None, None, 4.0]),
            )
            for index in range(8)
        }

    def add(self) -> None:
        task = self.rng.choice(list(self.limits))
        self.queue.add(
            make_sequence(
                str(next(self.num_added)),
                range(self.rng.randint(1, 9)),
                9,
                task=task,
                entitlement=self.limits[task],
                priority=self.rng.choice([0, 0, 0, 1]),
                arrival=self.rng.random(),
                is_internal=self.rng.random() < 0.05,
            )
        )
        if self.rng.random() < 0.1:
            of_scoring = make_sequence(str(next(self.num_added)), range(3), task=task)
            of_scoring.entitlement, of_scoring.is_continuation = self.limits[task], True
            self.queue.add(of_scoring)

    def start(self) -> None:
        """Start some of the first, as a step does: while the order is being told."""
        for sequence in itertools.islice(self.queue, self.rng.randint(1, 4)):
            if self.rng.random() < 0.8:
                self.queue.leave(sequence)
                self.queue.started(sequence)
                sequence.status = SequenceStatus.RUNNING
                self.running.append(sequence)

    def charge(self) -> None:
        for sequence in self.running:
            end = min(sequence.num_charged + self.rng.randint(1, 4), sequence.max_num_tokens)
            self.queue.charge(sequence, sequence.num_charged, end)

    def stop(self) -> None:
        if self.running:
            sequence = self.running.pop(self.rng.randrange(len(self.running)))
            self.queue.stopped(sequence)
            if self.rng.random() < 0.3:
                sequence.num_preemptions += 1
                self.queue.enter(sequence)
            else:
                self.queue.forget(sequence)

    def leave(self) -> None:
        waiting = self.queue.waiting()
        if waiting:
            sequence = self.rng.choice(waiting)
            self.queue.leave(sequence)
            self.queue.forget(sequence)

    def step(self) -> None:
        self.rng.choices((self.add, self.start, self.charge, self.stop, self.leave), (6, 4, 4, 3, 1))[0]()
        self.now_s += self.rng.choice([0.0, 0.05, 0.5])


@pytest.mark.parametrize("seed", range(30))
def test_the_order_is_that_of_looking_at_every_task(seed: int) -> None:
    trial = Trial(seed)
    for _ in range(400):
        trial.step()
        assert list(trial.queue) == list(plain_order(trial.queue))


@pytest.mark.parametrize("seed", range(5))
def test_a_task_that_begins_to_wait_is_lifted_as_if_all_were_looked_at(seed: int) -> None:
    rng = random.Random(seed)
    shares, plain = Shares(), PlainShares()
    for _ in range(3000):
        task = f"task {rng.randrange(40)}"
        if task not in shares._waiting:
            for each in (shares, plain):
                each.begin_waiting(task)
        elif rng.random() < 0.4:
            for each in (shares, plain):
                each.end_waiting(task)
        for each in (shares, plain):
            each.charge(make_sequence("x", range(2), task=task), 0, 2)
        assert shares.counter(task) == plain.counter(task)
        assert shares._floor == plain._floor
    assert len(shares._by_counter) <= 40


def num_looked_at(num_tasks: int) -> int:
    """How many places are worked out when one of as many waiting tasks starts, is served and asks again."""
    queue = Queue(SchedulerConfig(max_waiting=10**6), lambda: 0.0)
    for index in range(num_tasks):
        queue.add(make_sequence(str(index), range(4), 9, task=f"task {index}"))
    next(iter(queue))
    count, place = 0, queue._place

    def counted(task: str, sequence: Sequence, given: float) -> tuple[int, bool, float, float, int]:
        nonlocal count
        count += 1
        return place(task, sequence, given)

    queue._place = counted  # type: ignore[method-assign]
    for turn in range(20):
        sequence = next(iter(queue))
        queue.leave(sequence)
        queue.started(sequence)
        queue.charge(sequence, 0, 4)
        queue.stopped(sequence)
        queue.add(make_sequence(f"again {turn}", range(4), 9, task=sequence.task))
    return count


def test_a_turn_takes_as_long_beside_thousands_of_tasks_as_beside_a_few() -> None:
    assert num_looked_at(5000) == num_looked_at(50) <= 100


def test_thousands_of_tasks_at_their_limits_are_looked_at_once() -> None:
    now_s = 0.0
    queue = Queue(SchedulerConfig(max_waiting=10**6), lambda: now_s)
    limited = Entitlement(max_tokens_per_second=1.0)
    for index in range(1000):
        sequence = make_sequence(str(index), range(4), 9, task=f"task {index}", entitlement=limited)
        queue.add(sequence)
        queue.charge(sequence, 0, 4)  # 3 s in advance
    assert list(queue) == []
    asked = 0
    held_until_s = queue._limits.held_until_s

    def counted(sequence: Sequence, **others: bool) -> float:
        nonlocal asked
        asked += 1
        return held_until_s(sequence, **others)

    queue._limits.held_until_s = counted  # type: ignore[method-assign]
    assert list(queue) == []
    assert asked == 0
    now_s = 3.1
    assert len(list(queue)) == 1000
