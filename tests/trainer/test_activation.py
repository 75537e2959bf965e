"""Conditions on held-out results: read strictly, and refused before a training that cannot have them."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.trainer.errors import SettingError
from manyhats.trainer.registration import ActivationRule
from manyhats.trainer.report.report import Evaluation, HeldOut
from support.fakes.training import make_train_settings, with_data

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def evaluation(loss: float = 0.5, num_right: int | None = 9) -> Evaluation:
    before = HeldOut(loss=3.0, num_right=None if num_right is None else 1)
    after = HeldOut(loss=loss, num_right=num_right)
    return Evaluation(num_items=10, labels=("a", "b"), before=before, after=after)


@pytest.mark.parametrize(
    ("text", "unmet"),
    [
        ("accuracy >= 0.9", ""),
        ("accuracy>=90%", ""),
        (" accuracy > 0.9 ", "accuracy 0.9, not > 0.9"),
        ("accuracy >= 0.95", "accuracy 0.9, not >= 0.95"),
        ("loss < 5e-1", "loss 0.5, not < 0.5"),
        ("loss <= .5", ""),
        ("perplexity < 1.65", ""),
        ("perplexity<1.6", "perplexity 1.649, not < 1.6"),
        ("accuracy >= 0.8 and loss < 1", ""),
        ("accuracy >= 0.95 and loss < 0.1", "accuracy 0.9, not >= 0.95 and loss 0.5, not < 0.1"),
    ],
)
def test_condition_is_on_what_the_trained_model_held_out(text: str, unmet: str) -> None:
    assert ActivationRule.parse(text).unmet(evaluation()) == unmet


@given(
    loss=st.floats(0, 100),
    sign=st.sampled_from(sorted(OPERATORS)),
    number=st.floats(0, 1000, allow_subnormal=False),
    spaces=st.sampled_from(["", " ", "  "]),
)
def test_any_condition_holds_where_python_says_so(loss: float, sign: str, number: float, spaces: str) -> None:
    rule = ActivationRule.parse(f"loss{spaces}{sign}{spaces}{number!r}")
    assert (rule.unmet(evaluation(loss)) == "") == OPERATORS[sign](loss, number)
    assert rule == ActivationRule.parse(f"loss {sign} {number!r}")


@pytest.mark.parametrize(("loss", "num_right"), [(math.nan, 9), (math.inf, 9), (2000.0, 9), (0.5, None)])
@pytest.mark.parametrize("text", ["loss < 9 and accuracy >= 0", "perplexity < 1e300 and accuracy >= 0"])
def test_a_missing_or_endless_result_meets_nothing(loss: float, num_right: int | None, text: str) -> None:
    assert ActivationRule.parse(text).unmet(evaluation(loss, num_right))


def test_without_held_out_rows_nothing_is_met() -> None:
    assert ActivationRule.parse("loss < 9").unmet(None) == "no data was held out"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "accuracy",
        "accuracy >=",
        ">= 0.9",
        "accuracy 0.9",
        "accuracy => 0.9",
        "accuracy == 0.9",
        "0.9 <= accuracy",
        "accuracy >= x",
        "accuracy >= 0.9 or loss < 1",
        "accuracy >= 0.9 and",
        "and accuracy >= 0.9",
        "accuracy >= 0.9, loss < 1",
        "accuracy >= 1.2.3",
        "accuracy >= .",
        "loss < 1e999",
        "loss < -1",
        "loss < nan",
        "loss < 0x1",
        "accuracy >= 90",
        "accuracy >= 101%",
        "__import__('os') > 1",
        "loss < 1; loss > 0",
        "loss < ١",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        ActivationRule.parse(text)
    assert caught.value.setting == "activate_if"


@pytest.mark.parametrize(
    ("metric", "near"),
    [
        ("accurracy", "accuracy"),
        ("acc", None),
        ("Loss", "loss"),
        ("los", "loss"),
        ("perplex", "perplexity"),
        ("f", None),
    ],
)
def test_unknown_metric_is_named_with_the_nearest(metric: str, near: str | None) -> None:
    with pytest.raises(
        SettingError, match=f"'{metric}' is not a metric; these are: loss, perplexity, accuracy"
    ) as caught:
        ActivationRule.parse(f"{metric} > 1")
    assert (f"did you mean {near}?" in str(caught.value)) == (near is not None)


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("loss < 1", {"eval": ""}, "loss is measured on evaluation data, and fake has none"),
        ("accuracy > 0.5", {"eval": ""}, "accuracy is measured on evaluation data"),
        (
            "loss < 1 and accuracy > 0.5",
            {"eval": "e.jsonl"},
            "accuracy is measured on labels, and fake has none",
        ),
    ],
)
def test_a_training_that_will_not_have_the_result_is_refused(
    text: str, data: dict[str, str], message: str
) -> None:
    settings = with_data(make_train_settings(), **data)
    with pytest.raises(SettingError, match=message):
        ActivationRule.parse(text).check(settings)


def test_a_training_that_will_have_the_results_is_not_refused() -> None:
    settings = with_data(replace(make_train_settings()), eval="e.jsonl", labels=("auto",))
    ActivationRule.parse("accuracy > 0.5 and loss < 1 and perplexity < 9").check(settings)
