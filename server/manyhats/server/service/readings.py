"""What was found in texts: vectors, classes, entities, relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from manyhats.engine.output import Usage

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.server.service.class_scores import Scored

Vector = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """A vector for each text, in order.

    Attributes:
        vectors: [n] each, float32.
        num_tokens: of each text.
        usage: of all.
        adapter: the version they were made with; None for the base.
    """

    vectors: tuple[Vector, ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord | None


@dataclass(frozen=True, slots=True)
class Classifications:
    """The labels of each text, in order; ``num_tokens`` of each."""

    results: tuple[Scored, ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord


@dataclass(frozen=True, slots=True)
class TaggedToken:
    """One token of a text: its index, the characters [start, end) that it stands for, and its labels."""

    index: int
    start: int
    end: int
    scored: Scored


@dataclass(frozen=True, slots=True)
class Tagged(Generic[T]):
    """What is found in each text, in order: its tokens, special ones left out, or the entities that they make."""

    results: tuple[tuple[T, ...], ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord


@dataclass(frozen=True, slots=True)
class Ranked:
    """How relevant each text is to a query: (index, score), best first."""

    results: tuple[tuple[int, float], ...]
    num_tokens: tuple[int, ...]
    usage: Usage
    adapter: AdapterRecord


def together(usages: Sequence[Usage]) -> Usage:
    """What requests cost that ran together: all of their tokens, and the time of the slowest."""
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
        queue_s=max(usage.queue_s for usage in usages),
        prefill_s=max(usage.prefill_s for usage in usages),
        adapter_load_s=max(usage.adapter_load_s for usage in usages),
    )
