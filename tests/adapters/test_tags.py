"""Entities of words' tags: as transformers' pipeline groups them."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.tags import TaggedEntity, are_tags, tagged_entities

TAGS = ("O", "B-A", "I-A", "B-B", "I-B", "B", "B-O", "I-O")


def test_tags_begin_continue_and_end_entities() -> None:
    assert tagged_entities(["B-A", "I-A", "O", "I-B", "B-B", "A", "A"]) == [
        TaggedEntity("A", 0, 2),
        TaggedEntity("B", 3, 4),
        TaggedEntity("B", 4, 5),
        TaggedEntity("A", 5, 7),
    ]
    assert tagged_entities([]) == []


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_those_of_transformers_pipeline(tags: list[str]) -> None:
    pipeline: Any = import_module("transformers").TokenClassificationPipeline
    tokenizer = SimpleNamespace(convert_tokens_to_string=" ".join)
    own = SimpleNamespace(tokenizer=tokenizer)
    for name in ("get_tag", "group_sub_entities"):
        setattr(own, name, getattr(pipeline, name).__get__(own))
    words = [
        {"entity": tag, "score": 1.0, "word": "x", "start": place, "end": place + 1}
        for place, tag in enumerate(tags)
    ]
    groups = pipeline.group_entities(own, words)
    assert tagged_entities(tags) == [
        TaggedEntity(group["entity_group"], group["start"], group["end"])
        for group in groups
        if group["entity_group"] != "O"
    ]


def test_classes_are_tags_if_one_begins_or_continues() -> None:
    assert are_tags(["O", "I-A"])
    assert are_tags(["B-A"])
    assert not are_tags(["O", "NOUN", "b-a", "B"])
