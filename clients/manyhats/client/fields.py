"""Fields of messages: setting them so that a refusal names the field, and reading enums by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from manyhats.client.errors import InvalidRequestError


def assign(message: Message, name: str, value: Any, path: str) -> None:
    """Set a scalar, repeated or map field; a value that protobuf refuses becomes an error that names the field.

    Raises:
        InvalidRequestError: the value does not fit; names the field ``path``.
    """
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(getattr(message, name), str | bool | int | float):
            setattr(message, name, value)
        else:
            getattr(message, name).extend([value] if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise invalid(path, str(error)) from error


def invalid(path: str, description: str) -> InvalidRequestError:
    """The error that one field is wrong."""
    return InvalidRequestError(f"{path}: {description}", violations={path: description})


def enum_value(enum: Any, prefix: str, name: object, path: str) -> int:
    """``mean`` → ``POOLING_MEAN``'s number.

    Args:
        enum: the generated enum.
        prefix: what the names of its values begin with.
        name: of the value, in lower case; "none" for the unspecified one.
        path: the field, for errors.

    Raises:
        InvalidRequestError: there is no such value; names the field and the values.
    """
    numbers: dict[str, int] = {key.removeprefix(prefix).lower(): number for key, number in enum.items()}
    known = {"none" if number == 0 else key: number for key, number in numbers.items()}
    if not isinstance(name, str) or name not in known:
        raise invalid(path, f"must be one of {', '.join(known)}, not {name!r}")
    return known[name]


def enum_name(name_of: Callable[[Any], str], value: int, prefix: str) -> str:
    """``ADAPTER_STATE_ACTIVE`` → ``active``; a value newer than this client → its number; zero → empty."""
    if value == 0:
        return ""
    try:
        return name_of(value).removeprefix(prefix).lower()
    except ValueError:
        return str(value)
