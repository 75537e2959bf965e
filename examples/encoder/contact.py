"""``contact``: the names, mail addresses and phone numbers in a text, word by word.

The texts are those of ``contact-json``; words are split as BERT splits them, at punctuation, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from examples.tasks.task import Item

CLASSES = ("O", "B-NAME", "I-NAME", "B-EMAIL", "I-EMAIL", "B-PHONE", "I-PHONE")
_WORD = re.compile(r"\w+|[^\w\s]")


def tagged(item: Item) -> Mapping[str, list[str]]:
    """A row with ``tokens`` and ``tags``."""
    found: Mapping[str, str | None] = json.loads(item.answer)
    spans = {field.upper(): _span(item.message, value) for field, value in found.items() if value is not None}
    tokens = list(_WORD.finditer(item.message))
    return {
        "tokens": [token.group() for token in tokens],
        "tags": [_tag(token.start(), spans) for token in tokens],
    }


def _span(text: str, value: str) -> tuple[int, int]:
    begin = text.index(value)
    return begin, begin + len(value)


def _tag(position: int, spans: Mapping[str, tuple[int, int]]) -> str:
    for kind, (begin, end) in spans.items():
        if begin <= position < end:
            # A phone number may begin with a bracket, which is a word of its own.
            return f"{'B' if position == begin else 'I'}-{kind}"
    return "O"
