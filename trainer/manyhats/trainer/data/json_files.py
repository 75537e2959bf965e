"""Rows of JSON: one object per line (``.jsonl``), or a list of objects (``.json``)."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from manyhats.trainer.data.lines import MAX_LINE_BYTES, decoded, opened, text_lines
from manyhats.trainer.data.row import FIELDS, Row
from manyhats.trainer.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_ONE_OBJECT = "is an object; a .json file holds a list of objects, or one object per line"


def read_json_lines(path: Path) -> Iterator[Row]:
    """One row per line; blank lines are ignored.

    Raises:
        DataError: a line is not one JSON object, or has a key twice.
    """
    for number, line in text_lines(path):
        text = line.strip(" \t\r\n")
        if text:
            yield Row(_object(str(path), number, text), str(path), number)


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a list; a file that does not begin with ``[`` is read as JSON lines.

    Raises:
        DataError: as above, or the list is malformed, or the whole file is one object.
    """
    with opened(path) as file:
        is_list = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"[")
        file.seek(0)
        data = file.read() if is_list else b""
    if is_list:
        yield from _list_rows(str(path), decoded(data.removeprefix(codecs.BOM_UTF8), path, 1))
    else:
        yield from _lines_of_objects(path)


def _lines_of_objects(path: Path) -> Iterator[Row]:
    """As JSON lines, but distinguished from one object: spread over lines, or with the rows in a list."""
    rows = read_json_lines(path)
    try:
        first = next(rows, None)
    except DataError as error:
        if _num_lines_of_object(path) > 1:
            raise DataError(str(path), None, _ONE_OBJECT) from error
        raise
    if first is None:
        return
    if first.fields.keys().isdisjoint(FIELDS) and _has_list(first) and _num_lines_of_object(path):
        raise DataError(str(path), None, _ONE_OBJECT)
    yield first
    yield from rows


def _has_list(row: Row) -> bool:
    return any(isinstance(value, list) for value in row.fields.values())


def _num_lines_of_object(path: Path) -> int:
    """For a file that is one object and nothing else; 0 for any other, and for one too long for a line."""
    with opened(path) as file:
        data = file.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        return 0
    try:
        text = data.decode("utf-8-sig").strip()
        return text.count("\n") + 1 if isinstance(json.loads(text), dict) else 0
    except (ValueError, RecursionError):
        return 0


def _list_rows(source: str, text: str) -> Iterator[Row]:
    """The list's objects one by one, so that each has its line."""
    place = _after_space(text, text.index("[") + 1)
    line, counted = 1, 0
    if text[place : place + 1] == "]":
        _check_end(source, text, place)
        return
    while True:
        line, counted = line + text.count("\n", counted, place), place
        fields, place = _next_object(source, line, text, place)
        yield Row(fields, source, line)
        place = _after_space(text, place)
        mark = text[place : place + 1]
        if mark == "]":
            _check_end(source, text, place)
            return
        if mark != ",":
            raise DataError(source, _line_at(text, place), "the list lacks a comma or its end")
        place = _after_space(text, place + 1)


def _check_end(source: str, text: str, place: int) -> None:
    after = _after_space(text, place + 1)
    if after != len(text):
        raise DataError(source, _line_at(text, after), "something follows the list")


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _line_at(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _object(source: str, line: int, text: str) -> dict[str, object]:
    fields, end = _next_object(source, line, text, 0)
    if end != len(text):
        raise DataError(source, line, f"something follows the JSON object, at character {end + 1}")
    return fields


def _next_object(source: str, line: int, text: str, place: int) -> tuple[dict[str, object], int]:
    """The object that begins at a place, and the place after it."""
    try:
        value, end = _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        # The decoder counts lines from the text's beginning: right in a list, 1 in a line.
        number = line + text.count("\n", place, error.pos)
        raise DataError(source, number, f"is not JSON: {error.msg}, at character {error.colno}") from error
    except _JsonError as error:
        raise DataError(source, line, f"is not JSON: {error}") from error
    except ValueError as error:
        raise DataError(source, line, "has a number with too many digits") from error
    except RecursionError as error:
        raise DataError(source, line, "is nested too deeply") from error
    if not isinstance(value, dict):
        raise DataError(source, line, f"must be a JSON object, not {_kind(value)}")
    return value, end


def json_of_cell(text: str) -> object:
    """The value of a cell that contains JSON, read as strictly as a JSON file.

    Raises:
        ValueError: it is not JSON, or is ambiguous; says why.
    """
    try:
        value, end = _DECODER.raw_decode(text.strip(" \t\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, at line {error.lineno}, character {error.colno}") from error
    except _JsonError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError("it has a number with too many digits") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if end != len(text.strip(" \t\r\n")):
        raise ValueError(f"something follows it, at character {end + 1}")
    return value


class _JsonError(Exception):
    """JSON that Python would accept but that is ambiguous."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _JsonError(f"the key {twice!r} appears twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise _JsonError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
