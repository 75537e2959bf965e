"""Percentiles, goodput and failures of a load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.load.plot import plot
from manyhats.load.report import COLUMNS, Objective, percentile, report, rows
from manyhats.load.run import LEFT, OK, Answer
from manyhats.load.workload import Workload

ANSWERS = [
    Answer("a", 0.0, [0.5, 0.6, 0.7], 3, 0.7, OK),
    Answer("a", 1.0, [1.1, 1.8], 2, 1.8, OK),  # a gap that is too long
    Answer("a", 2.0, [4.5], 1, 4.5, OK),  # too late
    Answer("b", 3.0, [3.1, 3.2], 2, 3.2, LEFT),
    Answer("b", 3.0, [], 0, 3.1, "QUEUE_FULL"),
    Answer("", 4.0, [4.5], 1, 5.0, "DEADLINE_EXCEEDED"),
]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.floats(0, 100))
def test_percentiles_are_those_of_numpy_s_nearest_rank(values: list[float], percent: float) -> None:
    expected = np.percentile(np.array(values), percent, method="inverted_cdf")
    index = len(values) * percent / 100
    if abs(index - round(index)) > 1e-9 or index == int(index):  # rounding decides elsewhere
        assert percentile(sorted(values), percent) == expected


def test_a_report_counts_what_was_good_answered_left_and_failed() -> None:
    found = report(Workload(), Objective(first_s=1.0, gap_s=0.3), ANSWERS)
    assert (found.all.num_requests, found.all.num_ok, found.all.num_good) == (6, 3, 1)
    assert found.all.failures == {"DEADLINE_EXCEEDED": 1, "QUEUE_FULL": 1}
    assert list(found.tasks) == ["a", "b", ""]
    assert found.tasks["b"].num_ok == 0
    assert found.seconds == 5.0
    assert (found.goodput, found.tokens_per_s) == (1 / 5, 9 / 5)
    # What came until a caller left counts; what failed does not.
    assert found.all.first_ms == {50: 100.0, 95: 2500.0, 99: 2500.0, 100: 2500.0}
    assert found.all.gap_ms[100] == 700.0
    assert found.all.whole_ms == {50: 800.0, 95: 2500.0, 99: 2500.0, 100: 2500.0}
    assert found.all.refused_ms == {50: 100.0, 95: 100.0, 99: 100.0, 100: 100.0}
    assert found.tasks["a"].refused_ms == {}
    json.dumps(found.as_json(), allow_nan=False)


def test_the_table_has_all_and_then_the_tasks_that_were_asked_most() -> None:
    found = report(Workload(), Objective(1.0, 0.3), ANSWERS)
    table = rows(found, 2)
    assert [row[0] for row in table] == ["all", "a", "b"]
    assert all(len(row) == len(COLUMNS) for row in table)
    assert table[0][-1] == "1 DEADLINE_EXCEEDED, 1 QUEUE_FULL"
    assert rows(found, 9)[-1] == ("(base)", "1", "0", "0", *"––––––", "1 DEADLINE_EXCEEDED")


def test_a_greedy_load_tells_how_long_the_others_took_in_each_half() -> None:
    answers = [Answer("first", 0.1 * index, [0.1 * index + 9.0], 1, 9.0 + 0.1 * index) for index in range(50)]
    answers += [Answer("b", 1.0, [1.1], 1, 2.0), Answer("c", 4.9, [5.1], 1, 6.0)]
    answers += [Answer("b", 5.0, [5.3], 1, 6.0), Answer("c", 6.0, [], 0, 6.1, "QUEUE_FULL")]
    found = report(Workload(popularity="greedy", duration_s=10.0), Objective(), answers)
    assert found.beside is not None
    assert (found.beside.normal_ms, found.beside.greedy_ms) == (200.0, 300.0)
    assert found.beside.ratio == 1.5
    assert report(Workload(duration_s=10.0), Objective(), answers).beside is None
    assert report(Workload(popularity="greedy", duration_s=10.0), Objective(), answers[:52]).beside is None


def test_an_answer_without_pieces_was_never_begun() -> None:
    assert Answer("a", 1.0).first_s == math.inf
    assert not Objective(first_s=1e9).is_met(Answer("a", 1.0))


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no request came"):
        report(Workload(), Objective(), [])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn_of_whatever_came(tmp_path: Path, suffix: str) -> None:
    for answers in (ANSWERS, ANSWERS[4:5]):
        path = tmp_path / f"load.{suffix}"
        plot(answers, path)
        assert path.stat().st_size > 1000
