"""Which task is next, how far shares go apart, and what limits of a task hold back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.reserved_labels import Entitlement
from manyhats.engine.errors import QueueFullError
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.shares import OUTPUT_COST, PROMPT_COST
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence

SEATS = 4


@dataclass
class Task:
    """One that always has a few sequences waiting, of lengths between its least and most."""

    name: str
    share: float
    prompt: tuple[int, int]
    answer: tuple[int, int]
    rng: random.Random
    all: list[Sequence] = field(default_factory=list)

    def ask(self, scheduler: Scheduler) -> None:
        sequence = make_sequence(
            f"{self.name} {len(self.all)}",
            [self.rng.randrange(1000) for _ in range(self.rng.randint(*self.prompt))],
            self.rng.randint(*self.answer),
            cache_key=self.name.encode(),
            task=self.name,
            entitlement=Entitlement(share=self.share),
            arrival=self.rng.random(),
        )
        self.all.append(sequence)
        scheduler.add(sequence)

    @property
    def served(self) -> float:
        """What its sequences have cost so far, recomputed from them."""
        return (
            sum(
                min(each.num_charged, each.num_prompt_tokens) * PROMPT_COST
                + max(0, each.num_charged - each.num_prompt_tokens) * OUTPUT_COST
                for each in self.all
            )
            / self.share
        )

    @property
    def largest(self) -> float:
        """The most that one of its sequences costs, over its share."""
        return (self.prompt[1] * PROMPT_COST + self.answer[1] * OUTPUT_COST) / self.share


TASKS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 2.0, 5.0]),
        st.tuples(st.integers(1, 6), st.integers(6, 12)),
        st.tuples(st.integers(1, 3), st.integers(3, 12)),
    ),
    min_size=2,
    max_size=5,
)


@given(TASKS, st.integers(0, 2**32))
def test_tasks_that_always_wait_are_served_by_their_shares(
    drawn: list[tuple[float, tuple[int, int], tuple[int, int]]], seed: int
) -> None:
    rng = random.Random(seed)
    tasks = [Task(f"task {index}", *parts, rng) for index, parts in enumerate(drawn)]
    scheduler = make_scheduler(sequences=SEATS, waiting=1000)
    engine = ToyEngine(scheduler)
    # Any task may have had all seats when it was last its turn.
    bound = (SEATS + 1) * max(task.largest for task in tasks)
    for _ in range(150):
        for task in tasks:
            while sum(each.status.value == "waiting" for each in task.all) < SEATS + 1:
                task.ask(scheduler)
        engine.step()
        served = [task.served for task in tasks]
        assert max(served) - min(served) <= bound


def test_a_task_that_asks_for_much_does_not_hold_up_one_that_asks_for_little() -> None:
    def steps_to_start(num_greedy: int) -> int:
        scheduler = make_scheduler(sequences=SEATS, waiting=1000)
        engine = ToyEngine(scheduler)
        for index in range(num_greedy):
            scheduler.add(make_sequence(f"greedy {index}", range(4), 8, task="greedy", cache_key=b"greedy"))
        for _ in range(20):
            engine.step()
        quiet = make_sequence("quiet", range(4), 8, task="quiet", cache_key=b"quiet", arrival=1.0)
        scheduler.add(quiet)
        for count in range(1, 1000):
            if quiet in engine.step().started:
                return count
        raise AssertionError

    assert steps_to_start(500) == steps_to_start(SEATS + 20) <= 8


def test_a_task_that_was_alone_owes_nothing_and_one_that_was_away_has_saved_nothing() -> None:
    scheduler = make_scheduler(sequences=1, waiting=1000)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("b", range(4), 2, task="b", cache_key=b"b"))
    engine.drain()
    for index in range(50):
        scheduler.add(make_sequence(f"a {index}", range(4), 2, task="a", cache_key=b"a"))
    for _ in range(60):
        engine.step()
    for index in range(50):
        scheduler.add(make_sequence(f"b {index}", range(4), 2, task="b", cache_key=b"b", arrival=1.0))
    started: list[str] = []
    while len(started) < 20:
        started += [each.task for each in engine.step().started]
    assert abs(started.count("a") - started.count("b")) <= 1


def test_counters_of_tasks_that_have_gone_are_few() -> None:
    scheduler = make_scheduler(sequences=2, waiting=1000)
    engine = ToyEngine(scheduler)
    for index in range(2000):
        scheduler.add(make_sequence(str(index), range(2), 1, task=f"task {index}"))
        engine.step()
    assert len(scheduler._queue._shares._counters) <= 600


def test_the_last_seats_are_for_tasks_that_run_few() -> None:
    scheduler = make_scheduler(num_blocks=400, sequences=34, tokens=100, waiting=1000)
    engine = ToyEngine(scheduler)
    for index in range(60):
        scheduler.add(make_sequence(f"a {index}", range(2), 20, task="a", cache_key=b"a"))
    engine.step()
    assert scheduler.num_running == 34  # nobody else is known
    scheduler.add(make_sequence("b 0", range(2), 2, task="b", cache_key=b"b"))
    engine.drain()
    for index in range(60):
        scheduler.add(make_sequence(f"again {index}", range(2), 20, task="a", cache_key=b"a"))
    engine.step()
    assert scheduler.num_running == 31  # more than 8 for each of the three that are left free
    scheduler.add(make_sequence("late", range(2), 2, task="b", cache_key=b"b"))
    assert "b" in [each.task for each in engine.step().started]
    engine.drain()


def test_where_two_tasks_wait_all_seats_go_by_turns() -> None:
    scheduler = make_scheduler(num_blocks=400, sequences=34, tokens=100, waiting=1000)
    for task, share in (("a", 50.0), ("b", 1.0)):
        for index in range(60):
            scheduler.add(
                make_sequence(
                    f"{task} {index}",
                    range(2),
                    20,
                    task=task,
                    cache_key=task.encode(),
                    entitlement=Entitlement(share=share),
                )
            )
    ToyEngine(scheduler).step()
    assert [each.task for each in scheduler._running].count("a") >= 32


def busy_scheduler(num_greedy: int) -> tuple[Scheduler, ToyEngine]:
    """One on which so many sequences of a task decode, on 20 seats."""
    scheduler = make_scheduler(num_blocks=600, sequences=20, tokens=100, waiting=1000)
    engine = ToyEngine(scheduler)
    for index in range(num_greedy):
        scheduler.add(make_sequence(f"greedy {index}", range(2), 60, task="greedy", cache_key=b"greedy"))
    engine.step()
    return scheduler, engine


def tasks_of(schedule: Schedule) -> set[str]:
    return {chunk.sequence.task for chunk in schedule.chunks}


def test_a_task_on_more_than_its_share_sits_out_the_step_in_which_another_s_prompt_begins() -> None:
    scheduler, engine = busy_scheduler(18)
    scheduler.add(make_sequence("quiet", range(4), 8, task="quiet", cache_key=b"quiet"))
    assert tasks_of(engine.step()) == {"quiet"}
    both = engine.step()
    assert tasks_of(both) == {"quiet", "greedy"}
    assert len(both.chunks) == 19
    engine.drain()


def test_nobody_sits_out_two_steps_in_a_row() -> None:
    scheduler, engine = busy_scheduler(16)
    for index in range(12):
        scheduler.add(make_sequence(f"quiet {index}", range(4), 1, task="quiet", cache_key=b"quiet"))
        engine.step()
    greedy = [each for each in scheduler._running if each.task == "greedy"]
    assert len(greedy) == 16
    assert all(each.num_output_tokens == 1 + 6 for each in greedy)


def test_a_step_begins_few_prompts_of_a_task_that_has_most_of_the_seats_once_others_were_there() -> None:
    scheduler = make_scheduler(num_blocks=4000, sequences=20, tokens=1000, waiting=1000)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("other", range(2), 2, task="other"))
    engine.drain()
    for index in range(40):
        prompt = range(100 * index, 100 * index + 40)
        scheduler.add(make_sequence(f"greedy {index}", prompt, 60, task="greedy", cache_key=b"greedy"))
    begun = [len(engine.step().started) for _ in range(5)]
    # Up to half of the seats at once, then two prompts, which have 64 tokens and more, a step.
    assert begun[0] >= 11
    assert begun[1:3] == [2, 2]


def test_nobody_sits_out_where_that_would_save_little() -> None:
    scheduler, engine = busy_scheduler(8)  # less than half of the seats
    scheduler.add(make_sequence("quiet", range(4), 8, task="quiet", cache_key=b"quiet"))
    assert tasks_of(engine.step()) == {"quiet", "greedy"}


def test_recomputed_tokens_are_charged_once() -> None:
    scheduler = make_scheduler(num_blocks=6, sequences=3)
    engine = ToyEngine(scheduler)
    sequences = [
        make_sequence(name, range(6), 10, task=name, cache_key=name.encode(), uses_prefix_cache=False)
        for name in "abc"
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    engine.drain()
    assert sum(each.num_preemptions for each in sequences) > 0
    counters = [scheduler._queue._shares.counter(name) for name in "abc"]
    # The last token is never computed.
    assert pytest.approx([each - 0 for each in counters]) == [6 * PROMPT_COST + 9 * OUTPUT_COST] * 3


# Limits of a task


def test_no_more_of_a_task_run_than_it_may() -> None:
    scheduler = make_scheduler(sequences=8)
    engine = ToyEngine(scheduler)
    limited = Entitlement(max_concurrency=2)
    for index in range(6):
        scheduler.add(make_sequence(f"a {index}", range(3), 4, task="a", entitlement=limited))
        scheduler.add(make_sequence(f"b {index}", range(3), 4, task="b"))
    most = 0
    while scheduler.has_work:
        engine.step()
        running = [each.task for each in scheduler._running]
        assert running.count("a") <= 2
        most = max(most, running.count("b"))
    assert most == 6


def test_a_task_gets_no_more_tokens_a_second_than_it_may_and_the_rest_wait_for_it() -> None:
    now_s = 0.0
    scheduler = make_scheduler(sequences=8, waiting=1000, clock=lambda: now_s)
    engine = ToyEngine(scheduler)
    limited = Entitlement(max_tokens_per_second=10)
    sequences = [
        make_sequence(str(index), [index, 1, 2], 2, task="a", entitlement=limited) for index in range(40)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    held = 0
    while scheduler.has_work:
        engine.step()
        held += scheduler.is_held_back
        now_s += 0.1
        num_tokens = sum(each.num_charged for each in sequences)
        # A second's tokens at once, then the rate, and what had begun when they were used up.
        assert num_tokens <= 10 + 10 * now_s + 8 * 5
    assert now_s == pytest.approx(40 * 4 / 10, abs=4)
    assert held > 10


def test_a_task_at_its_limit_holds_up_no_other() -> None:
    scheduler = make_scheduler(sequences=1, clock=lambda: 0.0)
    engine = ToyEngine(scheduler)
    limited = Entitlement(max_tokens_per_second=1)
    for index in range(4):
        scheduler.add(make_sequence(f"a {index}", range(3), 1, task="a", entitlement=limited))
    scheduler.add(make_sequence("b", range(3), 1, task="b", cache_key=b"b", arrival=9.0))
    started = []
    for _ in range(6):
        started += [each.id for each in engine.step().started]
    assert started == ["a 0", "b"]
    assert scheduler.is_held_back


def test_what_is_held_back_is_dropped_and_cleared_like_any_other() -> None:
    scheduler = make_scheduler(sequences=4, clock=lambda: 0.0)
    engine = ToyEngine(scheduler)
    limited = Entitlement(max_concurrency=1)
    sequences = [make_sequence(str(index), range(3), 9, task="a", entitlement=limited) for index in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    engine.step()
    assert scheduler.drop("1") == 1
    scheduler.clear()
    assert all(each.is_finished for each in sequences)
    assert not scheduler.has_work


def test_the_last_places_of_the_queue_are_for_tasks_that_have_few() -> None:
    scheduler = make_scheduler(waiting=100)

    def fill(task: str) -> int:
        for count in range(101):
            try:
                scheduler.add(make_sequence(f"{task} {count}", [1], task=task))
            except QueueFullError:
                return count
        raise AssertionError

    first, second, third = fill("a"), fill("b"), fill("c")
    assert first > 85
    assert second >= 8
    assert third >= 1
    assert first + second + third <= 100


def test_tokens_that_wait_are_bounded_and_the_last_room_is_for_tasks_with_few() -> None:
    scheduler = make_scheduler(waiting=1000, waiting_tokens=900, sequences=1, num_blocks=2000)

    def fill(task: str, length: int) -> int:
        for count in range(1000):
            try:
                scheduler.add(make_sequence(f"{task} {count}", range(length), task=task))
            except QueueFullError as error:
                refusals.append((error.limit, "tokens of prompts are waiting" in str(error)))
                return count
        raise AssertionError

    refusals: list[tuple[int, bool]] = []
    assert fill("a", 20) == 40  # eight times the tokens that they leave
    assert fill("b", 20) == 5
    assert fill("c", 90) == 0
    assert scheduler.num_waiting == 45
    assert set(refusals) == {(900, True)}
    scheduler.clear()
    assert fill("d", 2000) == 1  # alone, a prompt may be longer than all the room


# Deadlines


def test_what_cannot_meet_its_deadline_is_given_up_before_it_starts() -> None:
    now_s = 0.0

    def clock() -> float:
        return now_s

    scheduler = make_scheduler(num_blocks=200, tokens=20, clock=clock)

    def step() -> tuple[Sequence, ...]:
        nonlocal now_s
        schedule = scheduler.schedule()
        now_s += 1.0  # at most 20 tokens a second
        scheduler.commit(schedule)
        for chunk in schedule.chunks:
            if chunk.end == chunk.sequence.num_tokens:
                scheduler.finish(chunk.sequence)
        return schedule.hopeless

    unknown = make_sequence("unknown", range(20), deadline_s=0.1)
    scheduler.add(unknown)
    assert step() == ()  # nothing is known of the pace yet
    late = make_sequence("late", range(100, 160), deadline_s=now_s + 2.5)
    in_time = make_sequence("in time", range(200, 260), deadline_s=now_s + 3.5)
    for sequence in (late, in_time):
        scheduler.add(sequence)
    assert step() == (late,)
    scheduler.finish(late)
    while scheduler.has_work:
        assert step() == ()
    assert in_time.is_finished
