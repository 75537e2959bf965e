"""Entities in a text, made of the classes of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from manyhats.adapters.tags import tagged_entities

if TYPE_CHECKING:
    from manyhats.engine.text.tokenizer import TokenSpan


class Aggregation(Enum):
    """Which token decides the class of a word.

    Each token is a word by itself (``SIMPLE``), or a word has the class of its first token (``FIRST``), or of the one
    with the greatest score (``MAX``). Words are those of ``words``.
    """

    SIMPLE = "simple"
    FIRST = "first"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Entity:
    """A part of a text that names something.

    Attributes:
        label: without the ``B-`` or ``I-`` that its tokens' classes begin with.
        start, end: its characters in the text, [start, end).
        text: these characters.
        score: the mean of its tokens' scores, or of its words'.
    """

    label: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class _Word:
    start: int
    end: int
    label: str
    score: float


def entities(
    text: str,
    spans: Sequence[TokenSpan],
    scores: npt.NDArray[np.float64],
    names: Sequence[str],
    aggregation: Aggregation,
) -> list[Entity]:
    """The entities in a text, in order, of words whose classes are tags as ``tagged_entities`` reads them.

    Args:
        text: it.
        spans: of its tokens.
        scores: [tokens, classes].
        names: of the classes.
        aggregation: of tokens to words.

    Source: ``aggregation_strategy`` of transformers' ``TokenClassificationPipeline``.
    """
    found = [
        _word(text, spans, scores, names, indices, aggregation) for indices in words(text, spans, aggregation)
    ]
    return [
        _entity(text, each.label, found[each.start : each.end])
        for each in tagged_entities([word.label for word in found])
    ]


def words(text: str, spans: Sequence[TokenSpan], aggregation: Aggregation) -> list[list[int]]:
    """The tokens of each word, by index.

    A word ends at white space, and where the tokenizer itself splits texts. Tokens without a visible character are in
    none.
    """
    found: list[list[int]] = []
    for index, span in enumerate(spans):
        if not text[span.start : span.end].strip():
            continue
        last = spans[found[-1][-1]] if found else None
        if last is None or aggregation is Aggregation.SIMPLE or _is_apart(text, last, span):
            found.append([])
        found[-1].append(index)
    return found


def _is_apart(text: str, last: TokenSpan, span: TokenSpan) -> bool:
    """Whether a token begins another word than the one before it."""
    between = text[last.end - 1 : span.start + 1]
    return span.word != last.word or any(character.isspace() for character in between)


def _word(
    text: str,
    spans: Sequence[TokenSpan],
    scores: npt.NDArray[np.float64],
    names: Sequence[str],
    indices: Sequence[int],
    aggregation: Aggregation,
) -> _Word:
    """A word; its class is that of one of its tokens."""
    decisive = indices[0]
    if aggregation is Aggregation.MAX:
        decisive = max(indices, key=lambda index: float(scores[index].max()))
    best = int(scores[decisive].argmax())
    start, end = spans[indices[0]].start, spans[indices[-1]].end
    seen = text[start:end]
    start, end = start + len(seen) - len(seen.lstrip()), start + len(seen.rstrip())
    return _Word(start, end, names[best], float(scores[decisive, best]))


def _entity(text: str, label: str, group: Sequence[_Word]) -> Entity:
    start, end = group[0].start, group[-1].end
    score = sum(word.score for word in group) / len(group)
    return Entity(label, start, end, text[start:end], score)
