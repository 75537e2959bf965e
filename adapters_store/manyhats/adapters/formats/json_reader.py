"""Strict JSON from an untrusted file: bounded in size, depth and number of values; no key twice, finite numbers."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, shown

# A whole string (even one that is never closed, so that no scan begins inside it), or one bracket.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_MAX_NUMBER_LENGTH = 40
# Commas, quotes and opening brackets, of which every value needs at least one: what is read takes at most about 40 MB,
# and a header with as many tensors as are served by default stays below.
_SIGNS = ',"[{'
_MAX_SIGNS = 2**19


class _RefusedValueError(ValueError):
    """A value that JSON's grammar or Python's reader allows, but this reader does not."""


def parse_json_object(data: bytes, subject: str, *, max_bytes: int, max_depth: int) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: the file's bytes, UTF-8 without a byte order mark.
        subject: the file's name, for errors.
        max_bytes: the largest size accepted.
        max_depth: the deepest nesting of objects and arrays accepted.

    Raises:
        AdapterTooLargeError: it is larger or deeper than allowed, or holds too many values.
        AdapterInvalidError: it is not strict JSON, repeats a key, has a number that is not finite, or is not an object.
    """
    if len(data) > max_bytes:
        raise AdapterTooLargeError(subject, f"has {len(data)} bytes; the limit is {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterInvalidError(subject, f"is not UTF-8 at byte {error.start}") from None
    if sum(map(text.count, _SIGNS)) > _MAX_SIGNS:
        raise AdapterTooLargeError(subject, f"has over {_MAX_SIGNS} commas, quotes and brackets")
    _check_depth(text, subject, max_depth)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except _RefusedValueError as error:
        raise AdapterInvalidError(subject, str(error)) from None
    except ValueError as error:
        raise AdapterInvalidError(subject, f"is not JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise AdapterInvalidError(subject, "is not a JSON object")
    if "\\u" in text:
        _check_text(value, subject)
    return value


def _check_depth(text: str, subject: str, max_depth: int) -> None:
    """Refuse deep nesting before the recursive parser sees it."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match.group()
        if token in "[{":
            depth += 1
            if depth > max_depth:
                raise AdapterTooLargeError(subject, f"is nested deeper than the limit of {max_depth}")
        elif token in "]}":
            depth -= 1


def _check_text(value: dict[str, Any], subject: str) -> None:
    """Refuse escapes of half a surrogate pair, which are not text and break every later encoding."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise AdapterInvalidError(subject, "has an unpaired surrogate escape") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedValueError(f"repeats the key '{shown(key)}'")
            seen.add(key)
    return made


def _parse_int(text: str) -> int:
    if len(text) > _MAX_NUMBER_LENGTH:
        raise _RefusedValueError(f"has a number of {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    if len(text) > _MAX_NUMBER_LENGTH or not math.isfinite(number := float(text)):
        raise _RefusedValueError(f"has a number out of range: {shown(text[:_MAX_NUMBER_LENGTH])}")
    return number


def _refuse_constant(text: str) -> float:
    raise _RefusedValueError(f"has {text}, which JSON does not allow")
