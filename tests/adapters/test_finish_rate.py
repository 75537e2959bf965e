"""How long those who are refused are told to wait."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.finish_rate import FinishRate


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def steadily(rate: FinishRate, clock: Clock, per_second: float, seconds: float) -> None:
    for _ in range(round(per_second * seconds)):
        clock.now_s += 1 / per_second
        rate.finished()


@pytest.mark.parametrize("per_second", [0.2, 1.0, 7.0, 40.0, 500.0])
@pytest.mark.parametrize("num_ahead", [1, 10, 1024])
def test_a_queue_takes_its_length_over_the_rate_within_bounds(per_second: float, num_ahead: int) -> None:
    clock = Clock()
    rate = FinishRate(clock=clock)
    steadily(rate, clock, per_second, 60)
    expected = min(max(num_ahead / per_second, 0.1), 60.0)
    assert rate.wait_s(num_ahead) == pytest.approx(expected, rel=0.7)


def test_where_nothing_is_known_it_is_a_second() -> None:
    clock = Clock()
    rate = FinishRate(clock=clock)
    assert rate.wait_s(1000) == 1.0
    steadily(rate, clock, 10, 5)
    assert rate.wait_s(1000) > 1.0
    clock.now_s += 31
    assert rate.per_second() == 0
    assert rate.wait_s(1000) == 1.0


def test_after_a_lull_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    rate = FinishRate(clock=clock)
    steadily(rate, clock, 1, 5)
    clock.now_s += 20
    steadily(rate, clock, 50, 2.5)
    assert rate.per_second() == pytest.approx(50, rel=0.3)


def test_those_since_a_moment_are_counted_to_half_a_second() -> None:
    clock = Clock()
    rate = FinishRate(clock=clock)
    steadily(rate, clock, 10, 5)
    since_s = clock.now_s
    assert rate.num_since(since_s) == 0
    steadily(rate, clock, 10, 5)
    assert rate.num_since(since_s) == pytest.approx(50, abs=6)
    assert rate.num_since(math.inf) == 0


def test_a_longer_queue_never_takes_less_and_a_faster_one_never_more() -> None:
    waits = []
    for per_second in (1, 4, 16):
        clock = Clock()
        rate = FinishRate(clock=clock)
        steadily(rate, clock, per_second, 40)
        waits.append([rate.wait_s(count) for count in range(0, 200, 7)])
        assert waits[-1] == sorted(waits[-1])
    assert all(slow >= quick for slow, quick in zip(waits[0], waits[2], strict=True))


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(0, 30)), max_size=30), st.integers(0, 10**6))
def test_it_is_always_between_a_tenth_of_a_second_and_a_minute(
    bursts: list[tuple[float, int]], num_ahead: int
) -> None:
    clock = Clock()
    rate = FinishRate(clock=clock)
    for pause_s, count in bursts:
        clock.now_s += pause_s
        for _ in range(count):
            rate.finished()
        assert 0.1 <= rate.wait_s(num_ahead) <= 60.0
        assert rate.per_second() <= sum(count for _, count in bursts) / 2


def test_what_finishes_on_many_threads_is_all_counted() -> None:
    clock = Clock()
    rate = FinishRate(clock=clock)
    threads = [threading.Thread(target=lambda: [rate.finished() for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rate.per_second() == 4000 / 2
