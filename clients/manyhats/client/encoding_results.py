"""What the client returns of texts that were read: frozen dataclasses, free of protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from manyhats.client.results import AdapterRef, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """A vector for each text, in the order requested.

    Attributes:
        values: the vectors, as lists of numbers.
        num_tokens: of each text.
        usage: what all of them cost.
        base_digest: identifies the base model; vectors of different ones cannot be compared.
        adapter: which one made them; None for the base model.
        request_id: the caller's, or the one the server gave.
    """

    values: list[list[float]]
    num_tokens: tuple[int, ...]
    usage: Usage
    base_digest: str = ""
    adapter: AdapterRef | None = None
    request_id: str = ""

    @property
    def vectors(self) -> Any:
        """The vectors as a NumPy array [texts, values], float32.

        Raises:
            ImportError: there is no NumPy, which the client itself does not need.
        """
        return import_module("numpy").array(self.values, dtype="float32")


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How well one class fits.

    Attributes:
        label: its name.
        index: its place among the task's classes.
        score: a probability, unless the task leaves logits as they are or ``raw_scores`` was given.
        logit: what the score comes from.
    """

    label: str
    index: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class Classification:
    """What one task says of one text: its classes, best first; ``num_tokens`` of the text, ``adapter`` that read it."""

    classes: tuple[ClassScore, ...]
    num_tokens: int = 0
    adapter: AdapterRef | None = None

    @property
    def label(self) -> str:
        """The best class's."""
        return self.classes[0].label

    @property
    def score(self) -> float:
        """The best class's."""
        return self.classes[0].score


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyResult:
    """What each task says of each text: text by text, and of each text task by task, in the order requested."""

    results: tuple[Classification, ...]
    usage: Usage
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class TokenClass:
    """The classes of one token, best first.

    Attributes:
        token_index: its place among the text's tokens, including special ones, which are left out.
        start, end: the characters of the text, [start, end), that it stands for.
        classes: its classes.
    """

    token_index: int
    start: int
    end: int
    classes: tuple[ClassScore, ...]


@dataclass(frozen=True, slots=True)
class Entity:
    """A part of a text that names something: the characters [start, end), which are ``text``."""

    label: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class TaggedText:
    """What is found in one text: its entities; or without an aggregation, the classes of its tokens."""

    entities: tuple[Entity, ...] = ()
    tokens: tuple[TokenClass, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TagResult:
    """What is found in each text, in the order requested."""

    results: tuple[TaggedText, ...]
    usage: Usage
    adapter: AdapterRef | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class RankedText:
    """How relevant one text is: its place in the request, higher scores for more; ``text`` if requested."""

    index: int
    score: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankResult:
    """The texts, the most relevant first."""

    results: tuple[RankedText, ...]
    usage: Usage
    adapter: AdapterRef | None = None
    request_id: str = ""
