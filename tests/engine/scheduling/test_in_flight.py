"""Schedules that are made before the one before them is committed."""

from __future__ import annotations

import pytest
import torch

from manyhats.adapters.primitives import KVPrefix
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from support.harnesses.scheduling import make_scheduler, make_sequence


class Slot:
    """A ``Placement`` that counts those who have it."""

    def __init__(self) -> None:
        self.num_placed = 0

    def can_place(self) -> bool:
        return True

    def place(self) -> int:
        self.num_placed += 1
        return 1

    def leave(self) -> None:
        self.num_placed -= 1


def launched(scheduler: Scheduler) -> Schedule:
    schedule = scheduler.schedule()
    scheduler.count_on(schedule)
    return schedule


def rows(schedule: Schedule) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.num_tokens) for chunk in schedule.chunks]


def taken(scheduler: Scheduler, schedule: Schedule, *sequences: Sequence) -> None:
    """Commit a schedule, of which these sequences get a token."""
    scheduler.commit(schedule)
    for sequence in sequences:
        scheduler.append_tokens(sequence, 7)


def test_a_step_goes_on_where_the_one_in_flight_will_have_come_to() -> None:
    scheduler = make_scheduler(tokens=8)
    long, short = make_sequence("long", [1] * 10, 3), make_sequence("short", [2] * 3, 3)
    scheduler.add(short)
    scheduler.add(long)
    first, second = launched(scheduler), launched(scheduler)
    assert rows(first) == [("short", 0, 3), ("long", 0, 5)]
    assert rows(second) == [("short", 3, 1), ("long", 5, 5)]
    assert (short.num_tokens, short.num_expected_tokens, short.num_computed_tokens) == (3, 5, 0)
    taken(scheduler, first, short)
    assert (short.num_tokens, short.num_expected_tokens, short.num_computed_tokens) == (4, 5, 3)
    assert rows(launched(scheduler)) == [("short", 4, 1), ("long", 10, 1)]


def test_two_steps_are_in_flight_at_most_and_the_first_must_be_counted_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 5, 9))
    first = scheduler.schedule()
    with pytest.raises(RuntimeError, match="not committed"):
        scheduler.schedule()
    scheduler.count_on(first)
    launched(scheduler)
    with pytest.raises(RuntimeError, match="not committed"):
        scheduler.schedule()
    scheduler.commit(first)
    with pytest.raises(ValueError, match="not in flight"):
        scheduler.count_on(first)


def test_a_token_that_ends_a_sequence_is_not_run() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("a", [1] * 5, 2)
    scheduler.add(sequence)
    first, second = launched(scheduler), launched(scheduler)
    taken(scheduler, first, sequence)
    assert scheduler.schedule().chunks == ()
    taken(scheduler, second, sequence)
    assert sequence.num_tokens == sequence.max_num_tokens


def test_blocks_and_slots_wait_for_the_newest_step() -> None:
    scheduler, slot = make_scheduler(), Slot()
    sequence = make_sequence("a", [1] * 5, 9, placement=slot)
    scheduler.add(sequence)
    scheduler.add(make_sequence("b", [2] * 5, 9))
    first, second = launched(scheduler), launched(scheduler)
    scheduler.commit(first)
    scheduler.finish(sequence)
    used = scheduler.allocator.num_used
    third = launched(scheduler)
    assert [name for name, _, _ in rows(third)] == ["b"]
    assert (scheduler.allocator.num_used, slot.num_placed) == (used, 1)
    scheduler.commit(second)
    assert (scheduler.allocator.num_used, slot.num_placed) == (used - 2, 0)


def test_what_waits_for_a_step_that_never_ran_waits_for_the_one_before_it() -> None:
    scheduler, slot = make_scheduler(), Slot()
    sequence = make_sequence("a", [1] * 5, 9, placement=slot)
    scheduler.add(sequence)
    first = launched(scheduler)
    second = scheduler.schedule()
    scheduler.finish(sequence)
    scheduler.undo(second)
    assert (scheduler.allocator.num_used, slot.num_placed) == (2, 1)
    scheduler.commit(first)
    assert (scheduler.allocator.num_used, slot.num_placed) == (0, 0)


def test_an_undone_step_is_scheduled_again_as_it_was() -> None:
    scheduler = make_scheduler(tokens=8)
    going, begun = make_sequence("going", [1] * 6, 9), make_sequence("begun", [2] * 4, 9)
    scheduler.add(going)
    first = launched(scheduler)
    scheduler.add(begun)
    second = launched(scheduler)
    assert rows(second) == [("going", 6, 1), ("begun", 0, 4)]
    scheduler.undo(second)
    assert (going.num_expected_tokens, going.num_reached_tokens) == (7, 6)
    assert (begun.num_expected_tokens, begun.num_reached_tokens, begun.block_table) == (4, 0, [])
    assert rows(launched(scheduler)) == rows(second)
    taken(scheduler, first, going)
    assert (going.num_tokens, going.num_computed_tokens, going.num_expected_tokens) == (7, 6, 8)


def test_full_blocks_can_be_found_once_their_step_is_committed() -> None:
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make_sequence("a", [1] * 9, 9))
    first = launched(scheduler)
    scheduler.add(make_sequence("b", [1] * 9, 9))
    second = launched(scheduler)
    assert second.prefix_cache_hits == 0
    scheduler.commit(first)
    scheduler.add(make_sequence("c", [1] * 9, 9))
    assert launched(scheduler).prefix_cache_hits == 8


@pytest.mark.parametrize("needs", [True, False])
def test_a_sequence_that_needs_its_tokens_must_have_them_before_it_goes_on(needs: bool) -> None:
    scheduler = make_scheduler(tokens=8)
    sequence = make_sequence("a", [1] * 12, 9)
    sequence.needs_tokens = needs
    scheduler.add(sequence)
    first = launched(scheduler)
    assert not scheduler.must_land, "a prompt is known"
    second = launched(scheduler)
    scheduler.commit(first)
    assert scheduler.must_land == needs
    taken(scheduler, second, sequence)
    assert not scheduler.must_land


def test_a_step_that_lacks_blocks_waits_for_the_one_in_flight_to_end() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    sequences = [make_sequence(name, [1, 2, 3, 4, 5, 6, 7], 8, uses_prefix_cache=False) for name in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    step = launched(scheduler)
    while not scheduler.must_land:
        following = launched(scheduler)
        taken(scheduler, step, *sequences)
        step = following
    assert [sequence.num_expected_tokens for sequence in sequences] == [13, 13], "a fourth block each"
    with pytest.raises(RuntimeError, match="committed first"):
        scheduler.schedule()
    taken(scheduler, step, *sequences)
    assert scheduler.schedule().preempted == (sequences[1],)


def test_a_prefix_that_nobody_uses_makes_room_though_steps_run_ahead() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4)
    zeros = torch.zeros(1, 12, 1, 1)
    virtual = VirtualTokens(KVPrefix(zeros, zeros, 0))
    user = make_sequence("user", [0] * 12 + [1], virtual=virtual)
    scheduler.add(user)
    scheduler.commit(scheduler.schedule())
    scheduler.finish(user)
    assert scheduler.allocator.num_used == 3, "its virtual tokens stay for others"
    running, waiting = make_sequence("running", [2] * 4, 8), make_sequence("waiting", [3] * 14, 1)
    scheduler.add(running)
    step = launched(scheduler)
    scheduler.add(waiting)
    following = launched(scheduler)
    assert [name for name, _, _ in rows(following)] == ["running"]
    assert virtual.held is not None, "its blocks would not be free yet"
    assert scheduler.must_land
    taken(scheduler, step, running)
    taken(scheduler, following, running)
    assert [name for name, _, _ in rows(scheduler.schedule())] == ["running", "waiting"]
    assert virtual.held is None
