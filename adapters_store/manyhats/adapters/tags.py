"""Classes of words as tags of entities: ``B-X`` begins an X, ``I-X`` continues it, ``O`` is in none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
"""The tag of words that are in no entity."""
_BEGINS, _CONTINUES = "B-", "I-"


@dataclass(frozen=True, slots=True)
class TaggedEntity:
    """Words in a row that name something.

    Attributes:
        label: without the ``B-`` or ``I-`` that their tags begin with.
        start, end: the words, [start, end).
    """

    label: str
    start: int
    end: int


def tagged_entities(tags: Sequence[str]) -> list[TaggedEntity]:
    """The entities that words' tags make, in order.

    ``B-X`` begins an X; ``I-X``, or ``X`` alone, continues the one before it, or begins one if that has another label.

    Source: ``group_entities`` of transformers' ``TokenClassificationPipeline``.
    """
    found: list[TaggedEntity] = []
    for place, tag in enumerate(tags):
        label = tag[2:] if tag.startswith((_BEGINS, _CONTINUES)) else tag
        if label == OUTSIDE:
            continue
        last = found[-1] if found else None
        if last is None or tag.startswith(_BEGINS) or (last.label, last.end) != (label, place):
            found.append(TaggedEntity(label, place, place + 1))
        else:
            found[-1] = TaggedEntity(label, last.start, place + 1)
    return found


def are_tags(names: Iterable[str]) -> bool:
    """Whether some of a task's classes say where an entity begins or goes on."""
    return any(name.startswith((_BEGINS, _CONTINUES)) for name in names)
