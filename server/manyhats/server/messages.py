"""Bytes that are no message: the method refuses them as it refuses a bad field.

gRPC itself would answer before any of our code is called, with UNKNOWN and the name of a Python class.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from manyhats.engine.errors import FieldInvalidError

Deserializer = Callable[[bytes], Any]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a message that could not be read; ``type_name`` is what it should have been."""

    type_name: str


def tolerant(deserialize: Deserializer | None) -> Deserializer | None:
    """A deserializer that gives ``Unreadable`` where ``deserialize`` fails; None, for raw bytes, stays None."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            message_class = getattr(deserialize, "__self__", None)
            return Unreadable(getattr(getattr(message_class, "DESCRIPTOR", None), "full_name", "this method"))

    return read


def check_readable(request: object) -> None:
    """See that there is a message.

    Raises:
        FieldInvalidError: its bytes could not be read.
    """
    if isinstance(request, Unreadable):
        raise FieldInvalidError("request", f"its bytes are no message of {request.type_name}")


async def readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The messages of a stream, each checked as it comes.

    Raises:
        FieldInvalidError: the bytes of one could not be read.
    """
    async for request in requests:
        check_readable(request)
        yield request
