"""Reading the bodies of requests: JSON of bounded size, into one struct."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive

from manyhats.engine.errors import FieldInvalidError, RequestCancelledError
from manyhats.server.service.errors import (
    RequestTooLargeError,
    UnsupportedMediaTypeError,
    UploadStalledError,
)
from manyhats.server.service.json_text import outlines

Body = TypeVar("Body")

MAX_BODY_BYTES = 4 * 1024 * 1024
JSON = "application/json"
SMALL_BYTES = 64 * 1024
"""A body of no more is decoded in milliseconds, whatever its content."""
# The decoder holds the interpreter lock. These take it some milliseconds, and are ten times what requests have: parts
# of conversations, tools and schemas; names and texts in them; token ids of many texts.
_MAX_CONTAINERS = 32_768
_MAX_STRINGS = 131_072
_MAX_VALUES = 524_288
_MAX_QUERY_FIELDS = 20
_MAX_UNKNOWN_FIELDS = 32
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`$")
# The decoder's names of types → what a caller calls them.
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
}


class WireFieldError(FieldInvalidError):
    """A field of a body or a query is not what it must be; it has the name that its caller gave it."""


class ByteStream:
    """The body of a request, to be read as it arrives.

    Args:
        receive: ASGI's, which must not tell that the caller has left.
        headers: the request's.
    """

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self._has_ended = False
        self.content_type = headers.get("content-type", "")

    async def read(self) -> bytes:
        """The bytes that come next; none at the end."""
        data = b""
        while not (data or self._has_ended):
            message = await self._receive()
            data = message.get("body", b"")
            self._has_ended = not message.get("more_body", False)
        return data


async def read_body(receive: Receive, headers: Headers, take: Callable[[int], None], limit_s: float) -> bytes:
    """The bytes of a request's JSON.

    Args:
        receive: ASGI's.
        headers: the request's.
        take: makes room for so many bytes of it (``Gate.message``).
        limit_s: how long nothing may arrive; all of it may take four times as long.

    Raises:
        MessagesError: there is no room.
        UnsupportedMediaTypeError: they are something else.
        RequestTooLargeError: there are too many; the rest is not read.
        UploadStalledError: the caller stopped sending.
        RequestCancelledError: it has left.
    """
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != JSON:
        raise UnsupportedMediaTypeError(given, JSON)
    if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise RequestTooLargeError(MAX_BODY_BYTES)
    body, end_s = bytearray(), time.monotonic() + 4 * limit_s
    while True:
        try:
            message = await asyncio.wait_for(receive(), min(limit_s, end_s - time.monotonic()))
        except TimeoutError:
            raise UploadStalledError(limit_s) from None
        if message["type"] == "http.disconnect":
            raise RequestCancelledError("the caller left before its request had arrived")
        piece = message.get("body", b"")
        take(len(piece))
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise RequestTooLargeError(MAX_BODY_BYTES)
        if not message.get("more_body", False):
            return bytes(body)


def decoded(data: bytes, kind: type[Body], ignored: Callable[[str], None] | None = None) -> Body:
    """A body as the struct ``kind``.

    Args:
        data: JSON.
        kind: what it must be; its structs forbid unknown fields.
        ignored: is told the name of each unknown field, which is then ignored; None refuses them.

    Raises:
        FieldInvalidError: names the field.
    """
    if not data:
        raise FieldInvalidError("body", "is empty; it must be a JSON object")
    if len(data) > SMALL_BYTES:
        _check_parts(data)
    try:
        if ignored is None:
            return msgspec.json.decode(data, type=kind)
        return _without_unknown(msgspec.json.decode(data), kind, ignored)
    except RecursionError:
        raise FieldInvalidError("body", "is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FieldInvalidError("body", f"is not JSON: {error}") from None


def _check_parts(data: bytes) -> None:
    """Check how many parts JSON has, by its outline alone, in pieces.

    Raises:
        FieldInvalidError: they are too many.
    """
    containers = strings = values = 0
    for piece in outlines(data):
        containers += piece.count(b"{") + piece.count(b"[")
        strings += piece.count(b'"')
        values += piece.count(b",")
        for number, limit, what in (
            (containers, _MAX_CONTAINERS, "objects and lists"),
            (strings, _MAX_STRINGS, "strings and names"),
            (values, _MAX_VALUES, "values"),
        ):
            if number > limit:
                raise FieldInvalidError("body", f"has more than {limit} {what}")


def query_of(query: bytes, kind: type[Body]) -> Body:
    """The fields of an address's query as the struct ``kind``.

    Raises:
        FieldInvalidError: names the field.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS)
    except ValueError:
        raise FieldInvalidError("query", f"must have at most {_MAX_QUERY_FIELDS} fields, in ASCII") from None
    try:
        return msgspec.convert(dict(pairs), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def _without_unknown(value: Any, kind: type[Body], ignored: Callable[[str], None]) -> Body:
    """Convert ``value``, leaving out unknown fields as they are found, each from all parts of a list at once.

    Raises:
        WireFieldError: there are too many: each takes another look at the whole.
        msgspec.ValidationError: something else is not as it must be.
    """
    for _ in range(_MAX_UNKNOWN_FIELDS):
        try:
            return msgspec.convert(value, kind, str_keys=True)
        except msgspec.ValidationError as error:
            text, place = _split(str(error))
            unknown = _UNKNOWN.fullmatch(text)
            if unknown is None:
                raise
            name = unknown[1]
            places = _at(value, place)
            if not any(name in each for each in places):  # its name looks like a place
                raise
            for each in places:
                each.pop(name, None)
            ignored(f"{place}.{name}" if place else name)
    raise WireFieldError("body", f"has {_MAX_UNKNOWN_FIELDS} or more unknown fields; fewer are ignored")


def _at(value: Any, place: str) -> list[dict[str, Any]]:
    """The objects in a decoded body at a place such as ``messages[0].content``, whatever the index in a list."""
    found = [value]
    for part in re.findall(r"[^.\[\]]+", place):
        deeper: list[Any] = []
        for each in found:
            if isinstance(each, list):
                deeper += each
            elif isinstance(each, dict) and part in each:
                deeper.append(each[part])
        found = deeper
    return [each for each in found if isinstance(each, dict)]


def _split(text: str) -> tuple[str, str]:
    """What the decoder says, and where."""
    found = _PLACE.search(text)
    return (text, "") if found is None else (text[: found.start()], found[1])


def _invalid(text: str) -> FieldInvalidError:
    problem, place = _split(text)
    for pattern, words in ((_UNKNOWN, "is not a field of this request"), (_MISSING, "is required")):
        found = pattern.fullmatch(problem)
        if found is not None:
            return WireFieldError(f"{place}.{found[1]}" if place else found[1], words)
    return WireFieldError(place or "body", _plain(problem))


def _plain(problem: str) -> str:
    """The decoder's words as JSON's: "Expected `int | null`, got `str`" is "must be an integer, not a string"."""
    found = re.fullmatch(r"Expected (.*), got (.*)", problem)
    if found is not None:
        return f"must be {_kinds(found[1])}, not {_kinds(found[2])}"
    found = re.fullmatch(r"Expected (.*)", problem)
    if found is not None:
        return f"must be {_kinds(found[1])}"
    found = re.fullmatch(r"Invalid value '(.*)'", problem, re.DOTALL)
    if found is not None:
        return f"is {found[1]!r}, which is not one that is known here"
    return problem[:1].lower() + problem[1:].replace("`", "'")


def _kinds(text: str) -> str:
    """Types in back quotes as JSON's; null goes without saying where others are allowed, as it is a field left out."""
    return re.sub(r"`([^`]*)`", lambda found: " or ".join(_named(found[1].split(" | "))), text)


def _named(kinds: Sequence[str]) -> list[str]:
    return [_KINDS.get(kind, kind) for kind in kinds if kind != "null" or len(kinds) == 1]
