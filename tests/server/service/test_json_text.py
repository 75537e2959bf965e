"""What is told of a JSON text from its bytes alone is what a parser would find."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from manyhats.server.service import text_threads
from manyhats.server.service.json_text import depth_of, outlines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\\\[]{},:\n\u00e9', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('b"\\\\{', max_size=3), inner, max_size=4)
    ),
    max_leaves=30,
)


def depth(value: Any) -> int:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max((depth(each) for each in inner), default=0)
    return 0


def num_strings(value: Any) -> int:
    if isinstance(value, str):
        return 1
    if isinstance(value, dict):
        return len(value) + sum(map(num_strings, value.values()))
    return sum(map(num_strings, value)) if isinstance(value, list) else 0


@given(VALUES, st.booleans(), st.integers(1, 9))
def test_an_outline_has_every_bracket_and_string_wherever_it_is_cut(
    value: Any, is_ascii: bool, size: int
) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii).encode()
    before, text_threads._SLICE_BYTES = text_threads._SLICE_BYTES, size
    try:
        pieces = b"".join(outlines(text))
        deepest = depth_of(text)
    finally:
        text_threads._SLICE_BYTES = before
    assert deepest == depth(value)
    assert pieces.count(b'"') == num_strings(value)
    whole = json.loads(text, parse_int=lambda digits: 0)
    assert pieces.count(b":") == json.dumps(_without_texts(whole)).count(":")


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(index): _without_texts(each) for index, each in enumerate(value.values())}
    if isinstance(value, list):
        return [_without_texts(each) for each in value]
    return "" if isinstance(value, str) else value
