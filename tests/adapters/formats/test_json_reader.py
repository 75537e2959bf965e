from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.errors import AdapterError, AdapterInvalidError, AdapterTooLargeError
from manyhats.adapters.formats.json_reader import parse_json_object

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Half surrogates are no text.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


def parse(data: bytes, *, max_bytes: int = 10_000, max_depth: int = 8) -> object:
    return parse_json_object(data, "file.json", max_bytes=max_bytes, max_depth=max_depth)


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=4), st.booleans()
)
def test_ordinary_json_is_read_as_the_standard_library_reads_it(
    value: dict[str, object], ascii_only: bool
) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse(data, max_bytes=10**6, max_depth=64) == value


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", AdapterInvalidError),
        (b"[]", AdapterInvalidError),
        (b"1", AdapterInvalidError),
        (b"{", AdapterInvalidError),
        (b"{} {}", AdapterInvalidError),
        (b"\xef\xbb\xbf{}", AdapterInvalidError),
        (b'{"a": "\xff"}', AdapterInvalidError),
        (b'{"a": 1, "a": 1}', AdapterInvalidError),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', AdapterInvalidError),
        (b'{"a": 1, "\\u0061": 2}', AdapterInvalidError),
        (b'{"a": NaN}', AdapterInvalidError),
        (b'{"a": -Infinity}', AdapterInvalidError),
        (b'{"a": 1e999}', AdapterInvalidError),
        (b'{"a": ' + b"1" * 5000 + b"}", AdapterInvalidError),
        (b'{"a": "\\ud800"}', AdapterInvalidError),
        (b'{"\\udc00": 1}', AdapterInvalidError),
        (b'{"a": "unclosed', AdapterInvalidError),
        (b'{"a": "\n"}', AdapterInvalidError),
        (b'{"a": ' + b"[" * 9 + b"]" * 9 + b"}", AdapterTooLargeError),
        (b"[" * 9000, AdapterTooLargeError),
        (b'{"a":' * 1500, AdapterTooLargeError),
        (b'{"a": "' + b"x" * 10_000 + b'"}', AdapterTooLargeError),
    ],
)
def test_anything_else_is_refused(data: bytes, error: type[AdapterError]) -> None:
    with pytest.raises(error) as caught:
        parse(data)
    assert caught.value.subject == "file.json"


def test_brackets_in_text_do_not_count_as_depth() -> None:
    assert parse(b'{"a": "[[[[[[[[[[{{{{{\\"[[[["}') == {"a": '[[[[[[[[[[{{{{{"[[[['}


@pytest.mark.parametrize("value", [b"[],", b"{},", b"0,", b'"",', b'{"a":0},', b'""', b"[{[{"])
def test_values_are_counted_before_any_is_made(value: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AdapterTooLargeError):
            parse(b'{"a": [' + value * (8_000_000 // len(value)) + b"0]}", max_bytes=10**7)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [b'{"' + b'\\"' * 400_000, b'"' * 500_001, b'{"a": "' + b"\\" * 800_001])
def test_time_is_linear_in_the_size_of_hostile_text(data: bytes) -> None:
    # Quadratic time would take hours, and the suite's timeout would end it.
    with pytest.raises(AdapterInvalidError):
        parse(data, max_bytes=10**6)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0dN1-.e tfn', max_size=60).map(str.encode))
def test_no_input_raises_anything_but_an_adapter_error(data: bytes) -> None:
    with contextlib.suppress(AdapterError):
        parse(data)
