from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.trainer.run.optimizer import learning_rate_factor, num_warmup_steps
from manyhats.trainer.settings.settings import OptimizationSettings

Schedule = Literal["linear", "cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "constant")


def factors(schedule: Schedule, warmup: float, num_steps: int) -> list[float]:
    settings = OptimizationSettings(schedule=schedule, warmup_steps=warmup)
    return [learning_rate_factor(settings, step, num_steps) for step in range(num_steps)]


def test_linear_rises_over_the_warm_up_and_falls_towards_zero() -> None:
    assert factors("linear", 4, 12) == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_cosine_falls_along_half_a_wave() -> None:
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert factors("cosine", 2, 10) == pytest.approx([0.5, 1.0, *expected])


def test_constant_stays_at_the_peak() -> None:
    assert factors("constant", 3, 6) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_warm_up_the_first_step_is_the_peak(schedule: Schedule) -> None:
    assert factors(schedule, 0, 5)[0] == 1.0


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0.03, 3), (0.025, 3), (0.5, 50), (0, 0), (1, 1), (7.0, 7), (200, 200)]
)
def test_warm_up_below_one_is_a_share_of_all_steps(warmup: float, expected: int) -> None:
    assert num_warmup_steps(OptimizationSettings(warmup_steps=warmup), 100) == expected


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(0, 60).map(float)),
    num_steps=st.integers(1, 50),
)
def test_every_step_moves_and_none_is_above_the_peak(
    schedule: Schedule, warmup: float, num_steps: int
) -> None:
    values = factors(schedule, warmup, num_steps)
    assert all(0 < value <= 1 for value in values)
    rise = min(num_warmup_steps(OptimizationSettings(warmup_steps=warmup), num_steps), num_steps)
    assert values[:rise] == sorted(values[:rise])
    assert values[rise:] == sorted(values[rise:], reverse=True)
