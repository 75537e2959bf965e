"""What a row of a head's data says: texts, and a label, tags, or which of them belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from manyhats.trainer.data.contents import checked_list, checked_text, refuse_unread
from manyhats.trainer.data.row import Row
from manyhats.trainer.settings.settings import DataSettings

Label = str | int | float | tuple[str, ...]
"""A class's name, a whole number that names one, a number, or the names of all classes that apply."""


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or the first of a pair, and its label."""

    text: str
    pair: str | None
    label: Label


@dataclass(frozen=True, slots=True)
class TaggedWords:
    """Words, and the class of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RelatedTexts:
    """A query, a text that answers it, and texts that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...]


HeadContents = LabelledText | TaggedWords | RelatedTexts

HEAD_FIELDS: Mapping[str, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "label"),
    "tokens": ("tokens", "tags"),
    "embedding": ("query", "positive", "negatives"),
}
"""The fields of a row, by the head that reads them."""
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "tokens": ("tokens", "tags"),
    "embedding": ("query", "positive"),
}


def head_contents(row: Row, head: str, settings: DataSettings) -> HeadContents:
    """What a row says to a head of this kind.

    Raises:
        DataError: a field is missing, has the wrong type, or is read by nothing; names it.
    """
    fields = {name: value for name, value in row.fields.items() if value is not None}
    needed = _NEEDED[head]
    for name in needed:
        if name not in fields:
            found = f"has {', '.join(fields)}" if fields else "has no value"
            raise row.error(f"{found}, but no {name}; for head {head} it must have {' and '.join(needed)}")
    refuse_unread(row, unknown_head_fields(row, head), "nothing reads it", settings)
    match head:
        case "classification":
            pair = fields.get("text_pair")
            return LabelledText(
                checked_text(row, "text", fields["text"]),
                None if pair is None else checked_text(row, "text_pair", pair),
                _label(row, fields["label"]),
            )
        case "tokens":
            return _tagged(row, fields)
        case _:
            return RelatedTexts(
                checked_text(row, "query", fields["query"]),
                checked_text(row, "positive", fields["positive"]),
                _texts(row, "negatives", fields.get("negatives", [])),
            )


def unknown_head_fields(row: Row, head: str) -> list[str]:
    """The row's fields that a head of this kind does not read and that are not empty."""
    return [name for name, value in row.fields.items() if name not in HEAD_FIELDS[head] and value is not None]


def name_of(label: str | int) -> str:
    """A class's name; one that is a whole number is called by its digits."""
    return label if isinstance(label, str) else str(label)


def _label(row: Row, value: object) -> Label:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise row.error("label: must be finite")
        return value
    if isinstance(value, list):
        return tuple(_class(row, f"label[{index}]", each) for index, each in enumerate(value))
    if isinstance(value, str):
        return checked_text(row, "label", value)
    raise row.error(f"label: must be a string, a number or a list, not {type(value).__name__}")


def _class(row: Row, name: str, value: object) -> str:
    """A class by its name, or by a whole number that is its name."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_text(row, name, value)


def _tagged(row: Row, fields: Mapping[str, object]) -> TaggedWords:
    words = _texts(row, "tokens", fields["tokens"])
    for index, word in enumerate(words):
        if not word.strip():
            raise row.error(f"tokens[{index}]: is white space")
    listed = checked_list(row, "tags", fields["tags"])
    tags = tuple(_class(row, f"tags[{index}]", tag) for index, tag in enumerate(listed))
    if not words:
        raise row.error("tokens: is empty")
    if len(tags) != len(words):
        raise row.error(f"tags: has {len(tags)}; tokens has {len(words)}")
    return TaggedWords(words, tags)


def _texts(row: Row, name: str, value: object) -> tuple[str, ...]:
    listed = checked_list(row, name, value)
    return tuple(checked_text(row, f"{name}[{index}]", each) for index, each in enumerate(listed))
