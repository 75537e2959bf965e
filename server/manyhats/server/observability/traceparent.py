"""The trace that a caller's call is part of, as its header or metadata ``traceparent`` says.

Source: W3C Trace Context, level 2 (www.w3.org/TR/trace-context-2), section 3.2.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

HEADER = "traceparent"
# Later versions may append fields; the first has none.
_FORMAT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Parent:
    """The span of which a call is part.

    Attributes:
        trace_id, span_id: in hexadecimal, as logs show them.
        is_sampled: whether the caller keeps its own.
    """

    trace_id: str
    span_id: str
    is_sampled: bool


def read_traceparent(values: Sequence[str]) -> Parent | None:
    """What all values of the header say together; None if there is none, or anything but one that is well-formed."""
    found = _FORMAT.fullmatch(values[0].strip(" \t")) if len(values) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if int(trace_id, 16) == 0 or int(span_id, 16) == 0 or (version == "00" and more):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def new_trace_id() -> str:
    """The id of a trace that begins here."""
    return secrets.token_hex(16)
