"""Requests that come faster than they are answered: which are refused by what their deadlines leave."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from manyhats.engine.errors import QueueTooSlowError
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.sequence import Entitlement, Sequence
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence

STEP_S = 0.25


@dataclass
class Machine:
    """Two sequences at a time, of two tokens each: four a second."""

    now_s: float = 100.0
    num_added: int = 0
    answered: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(sequences=2, tokens=2, waiting=1000, clock=lambda: self.now_s)
        self.engine = ToyEngine(self.scheduler)

    def ask(self, task: str = "", *, share: float = 1.0) -> None:
        self.num_added += 1
        entitlement = Entitlement(share=share)
        self.scheduler.add(
            make_sequence(
                str(self.num_added),
                [1, self.num_added],
                1,
                task=task,
                entitlement=entitlement,
                arrival=self.now_s,
            )
        )

    def refuses(self, left_s: float, task: str = "") -> bool:
        try:
            self.scheduler.check_queue(task, deadline_s=self.now_s + left_s)
        except QueueTooSlowError:
            return True
        return False

    def run(self, seconds: float) -> Iterator[float]:
        """Moments, a step apart."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            yield self.now_s
            self.engine.step()
            self.now_s += STEP_S


def test_a_request_that_waits_longer_than_its_deadline_is_refused() -> None:
    machine = Machine()
    for _ in machine.run(30):
        while machine.scheduler.num_waiting < 40:
            machine.ask()
    rate = machine.scheduler.rate.per_second()
    needed_s = 1.5 * (39 + machine.scheduler.num_running) / rate
    assert machine.refuses(0.9 * needed_s)
    assert not machine.refuses(1.1 * needed_s)
    with pytest.raises(QueueTooSlowError, match="with 39 requests ahead an answer takes about") as caught:
        machine.scheduler.check_queue(deadline_s=machine.now_s + 1.0)
    assert caught.value.retry_after_s == pytest.approx(39 / rate)


def test_without_a_deadline_the_queue_alone_decides() -> None:
    machine = Machine()
    for _ in machine.run(30):
        while machine.scheduler.num_waiting < 40:
            machine.ask()
    machine.scheduler.check_queue()


def test_a_burst_on_a_machine_that_was_idle_is_not_refused() -> None:
    machine = Machine()
    for at_s in machine.run(60):
        if at_s % 10 == 0:
            machine.ask()
    for _ in range(100):
        assert not machine.refuses(1.0)
        machine.ask()
    for _ in machine.run(2):
        assert not machine.refuses(0.1), "how fast it is has not been seen yet"


def test_a_greedy_task_is_refused_and_another_is_not() -> None:
    machine = Machine()
    for _ in machine.run(30):
        while machine.scheduler.num_waiting < 60:
            machine.ask("greedy")
    assert machine.refuses(10.0, "greedy")
    assert not machine.refuses(10.0, "quiet"), "it is its turn soon"


def test_a_larger_share_gets_through_more_of_its_own() -> None:
    machine = Machine()
    for _ in machine.run(30):
        for task, share in (("large", 3.0), ("small", 1.0)):
            while machine.scheduler._queue._of(task).num_requests < 20:
                machine.ask(task, share=share)
    large, small = (machine.scheduler._queue.num_ahead(task) for task in ("large", "small"))
    assert large == pytest.approx(20 * 4 / 3, abs=2)
    assert small == machine.scheduler.num_waiting


def test_what_gives_up_waiting_does_not_count_as_answered() -> None:
    machine = Machine()
    for _ in machine.run(30):
        while machine.scheduler.num_waiting < 40:
            machine.ask()
        for sequence in machine.scheduler._queue.waiting()[-3:]:
            machine.scheduler.finish(sequence)
    assert machine.scheduler.rate.per_second() <= 8


def test_under_three_times_the_load_nearly_all_that_is_admitted_is_in_time() -> None:
    machine = Machine()
    allowed_s = 10.0
    due: dict[Sequence, float] = {}
    late = in_time = refused = 0
    for at_s in machine.run(300):
        for _ in range(3 if at_s % 1 == 0 else 2):
            if machine.refuses(allowed_s):
                refused += 1
                continue
            machine.ask()
            due[next(s for s in machine.scheduler._queue.waiting() if s.id == str(machine.num_added))] = (
                at_s + allowed_s
            )
        for sequence in [each for each in due if each.is_finished]:
            if due.pop(sequence) >= machine.now_s:
                in_time += 1
            else:
                late += 1
    assert refused > 0
    assert late <= 0.02 * in_time
    assert in_time >= 0.9 * 300 * machine.scheduler.rate.per_second()


def test_a_burst_of_five_times_the_load_costs_little_of_what_is_answered() -> None:
    """From idle: whatever waits when it turns out to be too much is not begun only to be given up."""
    now_s, allowed_s = 100.0, 10.0
    scheduler = make_scheduler(
        num_blocks=100_000, sequences=64, tokens=256, waiting=1024, clock=lambda: now_s
    )
    engine, rng = ToyEngine(scheduler), random.Random(1)
    waiting: list[Sequence] = []
    num_answered = num_tokens = num_wasted = 0

    def wait(schedule: Schedule) -> None:
        nonlocal now_s
        now_s += 0.003 + 0.0012 * len(schedule.chunks) + 0.0003 * schedule.num_tokens

    next_s = now_s
    while now_s < 160.0:
        while next_s <= now_s:
            next_s += rng.expovariate(60.0)
            with suppress(QueueTooSlowError):
                scheduler.check_queue(deadline_s=now_s + allowed_s)
                prompt = [rng.randrange(1000) for _ in range(rng.randint(16, 128))]
                waiting.append(
                    make_sequence(
                        str(next_s),
                        prompt,
                        rng.randint(16, 64),
                        arrival=now_s,
                        deadline_s=now_s + allowed_s,
                    )
                )
                scheduler.add(waiting[-1])
        for sequence in engine.step(wait).hopeless:
            scheduler.finish(sequence, is_answered=False)
        for sequence in waiting:
            if not sequence.is_finished and now_s > (sequence.deadline_s or 0.0):
                scheduler.finish(sequence, is_answered=False)
            if sequence.is_finished and sequence.num_tokens == sequence.max_num_tokens:
                num_answered += 1
                num_tokens += sequence.num_output_tokens
            elif sequence.is_finished:
                num_wasted += sequence.num_output_tokens
        waiting = [sequence for sequence in waiting if not sequence.is_finished]
    assert num_answered > 0
    assert num_wasted <= 0.05 * num_tokens
