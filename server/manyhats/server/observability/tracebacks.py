"""Exceptions as the log shows them: where they were raised, but not what they say, which may quote a prompt."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

HIDDEN = "(hidden, as it may quote a caller; --log-level debug shows it)"

_MAX_CHAIN = 32  # exceptions that led to each other


def without_messages(error: BaseException) -> str:
    """An exception with all that led to it, oldest first: types and lines of code, and what the system itself says."""
    return "".join(_parts(error, set())).rstrip("\n")


def _parts(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    cause = error.__cause__
    before = cause if cause is not None or error.__suppress_context__ else error.__context__
    if before is not None and id(before) not in seen and len(seen) < _MAX_CHAIN:
        yield from _parts(before, seen)
        yield "\nled to:\n\n"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(error.__traceback__)
    kind = type(error)
    yield f"{kind.__module__}.{kind.__qualname__}: {_message(error)}\n"
    for each in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if id(each) not in seen:
            yield "\none of its exceptions:\n\n"
            yield from _parts(each, seen)


def _message(error: BaseException) -> str:
    """What the operating system says; everything else may come from anywhere."""
    return str(error.strerror) if isinstance(error, OSError) and error.errno is not None else HIDDEN
