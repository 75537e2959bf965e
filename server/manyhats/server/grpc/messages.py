"""Bytes that are not a message, or one that would take too long to parse: the method refuses them as a bad field.

gRPC itself would answer the former before any of our code is called, with UNKNOWN and the name of a Python class; and
it parses a message while holding the interpreter lock, which takes most of a second for some millions of empty parts.
Large messages are looked at and parsed off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from manyhats.engine.errors import FieldInvalidError
from manyhats.server.service.text_threads import TextThreads, paced

Deserializer = Callable[[bytes], Any]
# A message's position in the bytes, and its type.
_Part = tuple[int, int, Descriptor]

MIB = 1024 * 1024
# A text of the greatest length, or ids of the longest context, with everything else at its limit.
_MAX_BYTES = 2 * MIB
_MAX_BYTES_OF: Mapping[str, int] = MappingProxyType(
    {
        "manyhats.v1.ScoreRequest": 4 * MIB,
        "manyhats.v1.EmbedRequest": 4 * MIB,
        "manyhats.v1.ClassifyRequest": 4 * MIB,
        "manyhats.v1.ClassifyTokensRequest": 4 * MIB,
        "manyhats.v1.RerankRequest": 4 * MIB,
        "manyhats.v1.UploadAdapterRequest": 8 * MIB,
    }
)
# Fields, including those of nested messages: ten times as many as the largest conversation or scoring has.
_MAX_PARTS = 32_768
SMALL_BYTES = 64 * 1024
"""A message of no more is parsed in a millisecond or two, whatever its content."""
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a message that was not parsed, and says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands for a large message that is not parsed yet: ``read`` gives it, or ``Unreadable``."""

    num_bytes: int
    read: Callable[[], Any]


def tolerant(deserialize: Deserializer | None, *, max_bytes: int | None = None) -> Deserializer | None:
    """A deserializer that returns ``Unreadable`` for what it does not parse, and ``Unread`` for what is large.

    Args:
        deserialize: a message class's ``FromString``; None, for raw bytes, stays None.
        max_bytes: of a message; None for the limit of its class.
    """
    if deserialize is None:
        return None
    descriptor: Descriptor = deserialize.__self__.DESCRIPTOR  # type: ignore[attr-defined]
    limit = max_bytes or _MAX_BYTES_OF.get(descriptor.full_name, _MAX_BYTES)

    def parsed(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Unreadable(f"its bytes are not a {descriptor.full_name} message")

    def counted(data: bytes) -> Any:
        if _has_too_many_parts(data, descriptor):
            return Unreadable(f"has more than {_MAX_PARTS} fields, including nested ones")
        return parsed(data)

    def read(data: bytes) -> Any:
        if len(data) > limit:
            return Unreadable(f"has {len(data)} bytes; the limit is {limit}")
        return parsed(data) if len(data) <= SMALL_BYTES else Unread(len(data), partial(counted, data))

    return read


def _has_too_many_parts(data: bytes, descriptor: Descriptor) -> bool:
    """Whether a message has more than ``_MAX_PARTS`` fields, by its wire format alone.

    A broken part counts up to the break: that far it would be parsed.
    """
    parts = paced(_parts(data, descriptor), lambda part: 1)
    return any(number > _MAX_PARTS for number, _ in enumerate(parts, 1))


def _parts(data: bytes, descriptor: Descriptor) -> Iterator[_Part | None]:
    """Its fields, including nested ones; for messages, their position."""
    pending: list[_Part] = [(0, len(data), descriptor)]
    while pending:
        for inner in _fields(data, *pending.pop()):
            if inner is not None:
                pending.append(inner)
            yield inner


def _fields(data: bytes, at: int, end: int, message: Descriptor) -> Iterator[_Part | None]:
    """Yield the fields between two offsets, up to a broken one; for nested messages, their position."""
    depth = 0  # groups, which our messages do not have, are not parsed
    try:
        while at < end:
            key, at = _varint(data, at, end)
            inner = None
            match key & 7:
                case 0:
                    _, at = _varint(data, at, end)
                case 1:
                    at += 8
                case 2:
                    length, at = _varint(data, at, end)
                    begin, at = at, at + length
                    field = message.fields_by_number.get(key >> 3)
                    if depth == 0 and at <= end and field is not None and field.message_type is not None:
                        inner = (begin, at, field.message_type)
                case 3:
                    depth += 1
                case 4:
                    depth -= 1
                case 5:
                    at += 4
                case _:
                    return
            yield inner
    except ValueError:
        return


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A varint, and where it ends.

    Raises:
        ValueError: it does not end before ``end``, or has more than 64 bits.
    """
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")


def check_readable(request: object) -> None:
    """Check that there is a message.

    Raises:
        FieldInvalidError: it was not parsed.
    """
    if isinstance(request, Unreadable):
        raise FieldInvalidError("request", request.reason)


async def readable(request: Any, threads: Callable[[], TextThreads]) -> Any:
    """A message, parsed if it is not yet.

    Args:
        request: what ``tolerant`` made of it.
        threads: where large ones are parsed.

    Raises:
        FieldInvalidError: it cannot be.
    """
    if isinstance(request, Unread):
        request = await threads().read(request.read, request.num_bytes)
    check_readable(request)
    return request
