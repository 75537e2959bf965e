"""Entities of tokens' classes: as transformers' pipeline groups them, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from manyhats.engine.text.tokenizer import Tokenizer, TokenSpan
from manyhats.server.service.entities import Aggregation, Entity, entities, words
from support.factories.tiny_models import tiny_tokenizer

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")


def word_pieces() -> Tokenizer:
    """Pieces of two letters at most, and punctuation."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [a + b for a in letters for b in letters]
    own = [*letters, *pairs, ".", ",", "-"]
    vocabulary = {
        token: index for index, token in enumerate(["[UNK]", *own, *(f"##{token}" for token in own)])
    }
    backend = Backend(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Tokenizer(backend, special_tokens={})


WORD_PIECES = word_pieces()
BYTES = Tokenizer(tiny_tokenizer(), special_tokens={})


def spans_of(text: str, tokenizer: Tokenizer = WORD_PIECES) -> list[TokenSpan]:
    return tokenizer.spans(text, add_special_tokens=False, max_tokens=100)


def found(text: str, labels: Sequence[tuple[str, float]], aggregation: Aggregation) -> list[Entity]:
    """Entities where each token has this label with this score, and all others share the rest."""
    spans = spans_of(text)
    assert len(spans) == len(labels), [text[span.start : span.end] for span in spans]
    scores = np.array(
        [
            [score if name == label else (1 - score) / (len(NAMES) - 1) for name in NAMES]
            for label, score in labels
        ]
    )
    return entities(text, spans, scores, NAMES, aggregation)


def test_tags_begin_and_continue_entities() -> None:
    labels = [("B-PER", 0.9), ("B-PER", 0.7), ("I-PER", 0.8), ("O", 0.9), ("I-LOC", 0.5), ("B-LOC", 0.6)]
    assert found("an bo co at ex ye", labels, Aggregation.SIMPLE) == [
        Entity("PER", 0, 2, "an", pytest.approx(0.9)),
        Entity("PER", 3, 8, "bo co", pytest.approx(0.75)),
        Entity("LOC", 12, 14, "ex", pytest.approx(0.5)),
        Entity("LOC", 15, 17, "ye", pytest.approx(0.6)),
    ]


def test_a_label_without_a_tag_continues_and_another_begins() -> None:
    labels = [("MISC", 0.9), ("MISC", 0.7), ("I-PER", 0.8)]
    assert [(each.label, each.text) for each in found("an bo co", labels, Aggregation.SIMPLE)] == [
        ("MISC", "an bo"),
        ("PER", "co"),
    ]


def test_a_word_has_the_class_of_its_first_or_of_its_surest_token() -> None:
    labels = [("B-PER", 0.6), ("O", 0.9), ("I-LOC", 0.95)]  # an ##na ##bo
    simple, first, most = (found("annabo", labels, aggregation) for aggregation in Aggregation)
    assert [(each.label, each.text) for each in simple] == [("PER", "an"), ("LOC", "bo")]
    assert first == [Entity("PER", 0, 6, "annabo", pytest.approx(0.6))]
    assert most == [Entity("LOC", 0, 6, "annabo", pytest.approx(0.95))]


def test_punctuation_and_spaces_end_words() -> None:
    text = "anna, bo-co."
    groups = [
        ["".join(text[spans_of(text)[index].start : spans_of(text)[index].end] for index in word)]
        for word in words(text, spans_of(text), Aggregation.FIRST)
    ]
    assert groups == [["anna"], [","], ["bo"], ["-"], ["co"], ["."]]


def test_spaces_in_tokens_belong_to_no_entity() -> None:
    text = "the  the and"
    spans = spans_of(text, BYTES)
    assert any(text[span.start : span.end].startswith(" ") for span in spans)
    scores = np.tile(np.array([0.0, 0.9, 0.1, 0.0, 0.0, 0.0]), (len(spans), 1))
    seen = entities(text, spans, scores, NAMES, Aggregation.FIRST)
    assert [(each.start, each.end, each.text) for each in seen] == [
        (0, 3, "the"),
        (5, 8, "the"),
        (9, 12, "and"),
    ]


@given(st.text(st.sampled_from("abé 😀,\n"), min_size=1, max_size=20), st.sampled_from(Aggregation))
def test_every_visible_character_is_in_a_word_and_words_are_in_order(
    text: str, aggregation: Aggregation
) -> None:
    spans = spans_of(text, BYTES)
    scores = np.tile(np.array([0.0, 0.9, 0.1, 0.0, 0.0, 0.0]), (len(spans), 1))
    seen = entities(text, spans, scores, NAMES, aggregation)
    covered = {index for each in seen for index in range(each.start, each.end)}
    assert covered >= {index for index, character in enumerate(text) if not character.isspace()}
    assert all(each.text == text[each.start : each.end] == each.text.strip() for each in seen)
    assert [each.start for each in seen] == sorted(each.start for each in seen)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return import_module("transformers.pipelines.token_classification")


@given(
    parts=st.lists(st.sampled_from(["anna", "bo", "abcde", "x", ",", "."]), min_size=1, max_size=8),
    data=st.data(),
)
def test_entities_are_those_of_transformers_pipeline(
    pipeline: Any, parts: list[str], data: st.DataObject
) -> None:
    text = " ".join(parts)
    spans = spans_of(text)
    numbers = data.draw(
        st.lists(
            st.lists(st.integers(0, 1000), min_size=len(NAMES), max_size=len(NAMES)),
            min_size=len(spans),
            max_size=len(spans),
        )
    )
    scores = (np.array(numbers) + 1) / (np.array(numbers) + 1).sum(axis=1, keepdims=True)
    theirs = pipeline.TokenClassificationPipeline.__new__(pipeline.TokenClassificationPipeline)
    theirs.model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(NAMES))))
    theirs.tokenizer = _Pieces()
    for aggregation in Aggregation:
        before = [
            {
                "word": text[span.start : span.end],
                "scores": row,
                "start": span.start,
                "end": span.end,
                "index": index,
                "is_subword": span.start > 0 and text[span.start - 1] != " ",
            }
            for index, (span, row) in enumerate(zip(spans, scores, strict=True))
        ]
        strategy = pipeline.AggregationStrategy[aggregation.name]
        wanted = [each for each in theirs.aggregate(before, strategy) if each["entity_group"] != "O"]
        ours = entities(text, spans, scores, NAMES, aggregation)
        assert [(each.label, each.start, each.end) for each in ours] == [
            (each["entity_group"], each["start"], each["end"]) for each in wanted
        ]
        assert [each.score for each in ours] == pytest.approx([each["score"] for each in wanted])


class _Pieces:
    """What the pipeline reads of a tokenizer."""

    def convert_ids_to_tokens(self, index: Any) -> str:
        return str(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)
