"""Bulk tokens beside decodes: as many as a step has time for."""

from __future__ import annotations

import pytest

from manyhats.engine.scheduling.bulk_pace import BulkPace
from manyhats.engine.scheduling.schedule import Schedule
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence


def test_nothing_is_limited_before_both_kinds_of_steps_were_seen() -> None:
    pace = BulkPace()
    assert pace.limit(1) is None
    pace.note(0, 8, 1.0)
    pace.note(1, 8, 1.0)
    assert pace.limit(1) is None
    pace.note(1, 0, 0.010)
    assert pace.limit(1) is None
    pace.note(1, 8, 0.018)  # a millisecond each
    assert pace.limit(1) == 15
    assert pace.limit(3) == 15  # as far as is known
    assert pace.limit(0) is None


def test_the_limit_follows_what_tokens_cost_and_is_never_none_at_all() -> None:
    pace = BulkPace()
    pace.note(1, 0, 0.010)
    pace.note(1, 8, 0.018)
    for _ in range(200):
        pace.note(1, 4, 0.010 + 4 * 0.005)
    assert pace.limit(1) == 3
    for _ in range(200):
        pace.note(1, 1, 0.100)
    assert pace.limit(1) == 1
    for _ in range(200):
        pace.note(1, 1, 0.011)
    assert pace.limit(1) == pytest.approx(15, abs=1)


def test_one_step_that_was_held_up_changes_little() -> None:
    pace = BulkPace()
    for _ in range(20):
        pace.note(1, 0, 0.010)
        pace.note(1, 8, 0.018)
    pace.note(1, 8, 3.0)
    assert pace.limit(1) == pytest.approx(12, abs=1)


@pytest.mark.parametrize("cost_of_position_s", [0.0, 1e-6])
def test_steps_beside_a_long_prompt_take_less_than_three_times_as_long_as_its_neighbours_alone(
    cost_of_position_s: float,
) -> None:
    now_s = 0.0
    scheduler = make_scheduler(num_blocks=2000, tokens=64, bulk=8, clock=lambda: now_s)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("stream", range(3), 3000))
    long = make_sequence("long", range(1000, 3000), 1)
    seconds: list[float] = []

    def run(schedule: Schedule) -> None:
        nonlocal now_s
        bulk = [chunk for chunk in schedule.chunks if chunk.sequence is long]
        # At its end, with the second cost, a token of the prompt takes five times what it took at the beginning.
        took_s = 0.004 + sum(c.num_tokens * (0.0005 + cost_of_position_s * c.start) for c in bulk)
        now_s += took_s
        if bulk:
            seconds.append(took_s)

    for _ in range(20):
        engine.step(run)
    scheduler.add(long)
    while not long.is_finished:
        engine.step(run)
    assert max(seconds) < 3 * 0.004
    if not cost_of_position_s:
        assert len(seconds) == 2000 / 8  # as many tokens in each as there may be
