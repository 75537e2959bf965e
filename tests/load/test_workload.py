"""When requests come, and for which tasks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.load.workload import POPULARITIES, PRESETS, Popularity, Workload, arrivals

TASKS = [f"task {index}" for index in range(20)]


@given(
    st.sampled_from(POPULARITIES),
    st.floats(0.5, 20),
    st.tuples(st.integers(1, 20), st.integers(20, 40)),
    st.tuples(st.integers(1, 9), st.integers(9, 12)),
    st.floats(0, 1),
    st.integers(0, 2**64),
)
def test_arrivals_are_in_order_in_bounds_and_the_same_again(
    popularity: Popularity,
    rate: float,
    prompt: tuple[int, int],
    answer: tuple[int, int],
    cancel_share: float,
    seed: int,
) -> None:
    workload = Workload(
        popularity=popularity,
        rate=rate,
        duration_s=5,
        prompt_tokens=prompt,
        answer_tokens=answer,
        cancel_share=cancel_share,
        seed=seed,
    )
    found = list(arrivals(workload, TASKS))
    assert found == list(arrivals(workload, TASKS))
    assert [each.at_s for each in found] == sorted(each.at_s for each in found)
    for each in found:
        assert 0 < each.at_s < 5
        assert each.task in TASKS
        assert prompt[0] <= len(each.prompt.split()) <= prompt[1]
        assert answer[0] <= each.num_tokens <= answer[1]
        assert each.cancel_after is None or 1 <= each.cancel_after <= each.num_tokens
    if cancel_share in (0, 1):
        assert all((each.cancel_after is not None) == cancel_share for each in found)


def test_requests_come_at_the_rate() -> None:
    found = list(arrivals(Workload(rate=50, duration_s=200), TASKS))
    assert len(found) == pytest.approx(50 * 200, rel=0.05)
    # Of a Poisson process the number in a second has its mean as its variance.
    each_second = Counter(int(each.at_s) for each in found)
    mean = len(found) / 200
    variance = sum((each_second[second] - mean) ** 2 for second in range(200)) / 200
    assert variance == pytest.approx(mean, rel=0.4)


def test_tasks_are_as_popular_as_the_workload_says() -> None:
    def counts(popularity: Popularity) -> list[int]:
        found = Counter(
            each.task for each in arrivals(Workload(rate=100, duration_s=300, popularity=popularity), TASKS)
        )
        return [found[task] for task in TASKS]

    uniform, zipf, skewed, cold = (counts(each) for each in POPULARITIES[:4])
    assert max(uniform) < 1.2 * min(uniform)
    assert zipf[0] / zipf[9] == pytest.approx(10, rel=0.2)
    assert skewed[0] / (sum(skewed[1:]) / 19) == pytest.approx(50, rel=0.15)
    assert max(cold) - min(cold) <= 1


def test_the_first_task_becomes_greedy_and_the_others_go_on_as_before() -> None:
    found = list(arrivals(Workload(rate=10, duration_s=400, popularity="greedy"), TASKS))
    halves = [[each for each in found if (each.at_s >= 200) == is_second] for is_second in (False, True)]
    of_first = [sum(each.task == TASKS[0] for each in half) for half in halves]
    of_others = [len(half) - first for half, first in zip(halves, of_first, strict=True)]
    assert of_first[0] == pytest.approx(8 * 200, rel=0.1)
    assert of_first[1] == pytest.approx(50 * 8 * 200, rel=0.05)
    assert of_others == pytest.approx([2 * 200, 2 * 200], rel=0.2)
    assert {each.task for half in halves for each in half} == set(TASKS)


def test_presets_can_be_made() -> None:
    for preset in PRESETS.values():
        assert len(list(arrivals(replace(preset, duration_s=5, rate=20), ["one"]))) > 0
