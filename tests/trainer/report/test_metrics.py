"""Accuracy and F1 by their definitions, and the places of right texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.trainer.data.head_tokens import NOTHING
from manyhats.trainer.report.head_scoring import ranks
from manyhats.trainer.report.metrics import (
    macro_f1,
    of_class_sets,
    of_classes,
    of_numbers,
    of_ranks,
    of_tags,
)


def test_classes() -> None:
    metrics = of_classes(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    # Class 0: 1 found, 1 wrong; class 1: 2 found, 1 missed.
    assert metrics == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 4 / 5) / 2)}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_of_precision_and_recall_s_harmonic_means(pairs: list[tuple[int, int]]) -> None:
    predicted, right = (np.array(each) for each in zip(*pairs, strict=True))
    scores = []
    for each in {*predicted.tolist(), *right.tolist()}:
        hits = sum(p == r == each for p, r in pairs)
        found, wanted = sum(p == each for p, _ in pairs), sum(r == each for _, r in pairs)
        precision, recall = hits / found if found else 0.0, hits / wanted if wanted else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(predicted, right) == pytest.approx(sum(scores) / len(scores))


def test_sets_of_classes() -> None:
    predicted = np.array([[True, False, False], [True, True, False]])
    right = np.array([[True, False, False], [True, False, False]])
    # Of the third class there is nothing to find; the second is found where it is not.
    assert of_class_sets(predicted, right) == {"accuracy": 0.5, "f1": 0.5}


def test_numbers() -> None:
    assert of_numbers(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))["pearson"] == pytest.approx(1)
    assert of_numbers(np.array([1.0, 1.0]), np.array([2.0, 4.0])) == {}


def test_tags_of_entities() -> None:
    names = ("O", "B-A", "I-A")
    right = [[1, 2, 0], [0, 1]]
    assert of_tags(right, right, names) == {"accuracy": 1.0, "f1": 1.0}
    # One entity of two is cut short, which is neither found nor right.
    metrics = of_tags([[1, 0, 0], [0, 1]], right, names)
    assert metrics == {"accuracy": pytest.approx(4 / 5), "f1": pytest.approx(0.5)}
    missing = of_tags([[1, NOTHING, 0], [0, 1]], right, names)
    assert missing == metrics


def test_tags_that_make_no_entities_are_classes() -> None:
    metrics = of_tags([[0, 1], [1]], [[0, 1], [0]], ("NOUN", "VERB"))
    assert metrics == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}


def test_places_of_right_texts() -> None:
    assert of_ranks([1, 2, 4]) == {
        "accuracy": pytest.approx(1 / 3),
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 4) / 3),
    }
    vectors = np.array([[1, 0], [2, 0], [1, 1], [0, 3], [0.9, 1]], dtype=np.float32)
    # The query 0 has the answer 1; the query 3 has 2, of which 4 is closer.
    assert ranks(vectors, [[0, 1], [3, 2, 4]]) == [1, 2]


def test_equal_vectors_share_the_first_place() -> None:
    vectors = np.random.default_rng(0).normal(size=(1, 384)).astype(np.float32).repeat(5, axis=0)
    assert ranks(vectors, [[0, 1, 2], [3, 4]]) == [1, 1]
