"""Classes, shares and limits among a version's labels: in order, apart from each other, and bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.heads import ScoreActivation
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.reserved_labels import (
    MAX_CLASSES,
    MAX_CONCURRENCY,
    MAX_TOKENS_PER_SECOND,
    SHARE,
    Classes,
    Entitlement,
    class_names,
    listed,
    numbered,
    read_activation,
    read_classes,
    read_entitlement,
)

TWO = {"class.0": "a", "class.1": "b"}
texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs"]), min_size=1, max_size=20)


@given(st.lists(texts, min_size=1, max_size=12, unique=True), st.booleans(), texts | st.just(""))
def test_labels_say_what_the_classes_are(answers: list[str], is_chat: bool, system: str) -> None:
    classes = Classes(tuple(answers), is_chat, system if is_chat else "")
    assert read_classes({**classes.labels(), "team": "a", "default.top_k": "1"}) == classes


def test_labels_without_classes() -> None:
    assert read_classes({"class": "a", "classes.0": "b", "team": "c"}) is None


@given(st.lists(st.text(max_size=3), max_size=30))
def test_a_list_is_read_as_it_was_written(values: list[str]) -> None:
    assert listed({**numbered("class.", values), "class": "no"}, "class.") == tuple(values)


@pytest.mark.parametrize(
    ("labels", "subject"),
    [
        ({f"class.{number}": str(number) for number in range(MAX_CLASSES + 1)}, "labels"),
        ({"class.1": "a", "class.2": "b"}, "labels[class.2]"),
        ({**TWO, "class.3": "c"}, "labels[class.3]"),
        ({**TWO, "class.02": "c"}, "labels[class.02]"),
        ({**TWO, "class.x": "c"}, "labels[class.x]"),
        ({**TWO, "class.": "c"}, "labels[class.]"),
        ({**TWO, "class.2": ""}, "labels[class.2]"),
        ({**TWO, "class.2": "a"}, "labels[class.2]"),
        ({**TWO, "class.2": "c\x1b"}, "labels[class.2]"),
        ({**TWO, "class.2": "c" * 257}, "labels[class.2]"),
        ({**TWO, "classify.prompt": "Text"}, "labels[classify.prompt]"),
        ({**TWO, "classify.template": "x"}, "labels[classify.template]"),
        ({**TWO, "classify.prompt": "text", "classify.system": "x"}, "labels[classify.system]"),
        ({**TWO, "classify.system": "x" * 4097}, "labels[classify.system]"),
        ({"classify.system": "x"}, "labels[classify.system]"),
        ({"classify.prompt": "chat"}, "labels[classify.prompt]"),
        ({"classify.activation": "Sigmoid"}, "labels[classify.activation]"),
        ({**TWO, "classify.activation": ""}, "labels[classify.activation]"),
        ({"share": ""}, "labels[share]"),
        ({"share": "0"}, "labels[share]"),
        ({"share": "-1"}, "labels[share]"),
        ({"share": "nan"}, "labels[share]"),
        ({"share": "inf"}, "labels[share]"),
        ({"share": "1e7"}, "labels[share]"),
        ({"share": "much"}, "labels[share]"),
        ({"limit.concurrency": "0"}, "labels[limit.concurrency]"),
        ({"limit.concurrency": "1.5"}, "labels[limit.concurrency]"),
        ({"limit.concurrency": "two"}, "labels[limit.concurrency]"),
        ({"limit.tokens_per_second": "0.5"}, "labels[limit.tokens_per_second]"),
        ({"limit.tokens_per_second": "-5"}, "labels[limit.tokens_per_second]"),
        ({"limit.requests": "5"}, "labels[limit.requests]"),
        ({f"l{number}": "" for number in range(65)}, "labels"),
        (
            {f"class.{number}": f"{number:03}" + "\N{TOP HAT}" * 253 for number in range(MAX_CLASSES)},
            "labels",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(labels: dict[str, str], subject: str) -> None:
    with pytest.raises(ArgumentInvalidError) as caught:
        Registration("sql", Uri("a"), labels=labels)
    assert caught.value.subject == subject


def test_labels_say_how_logits_become_scores() -> None:
    for activation in ScoreActivation:
        labels = {"classify.activation": activation.value}
        assert Registration("sql", Uri("a"), labels=labels).labels == labels
        assert read_activation(labels) is activation
    assert read_activation({}) is None


def test_outputs_of_a_head_have_names() -> None:
    assert class_names(TWO, 2) == ("a", "b")
    assert class_names({}, 2) == ("LABEL_0", "LABEL_1")
    assert class_names({}, 0) == ()


def test_labels_at_the_limits() -> None:
    labels = {f"class.{number}": f"{number:03}\n" + "x" * 252 for number in range(MAX_CLASSES)}
    labels |= {f"l{number}": "" for number in range(63)} | {"classify.system": "x\n" * 2048}
    assert Registration("sql", Uri("a"), labels=labels).labels == labels


@given(st.none() | st.floats(0.001, 1e6), st.none() | st.integers(1, 10**6), st.none() | st.floats(1.0, 1e6))
def test_labels_say_what_a_task_may_take(
    share: float | None, concurrency: int | None, rate: float | None
) -> None:
    said = {SHARE: share, MAX_CONCURRENCY: concurrency, MAX_TOKENS_PER_SECOND: rate}
    labels = {key: repr(value) for key, value in said.items() if value is not None}
    assert read_entitlement(labels) == Entitlement(1.0 if share is None else share, concurrency, rate)
