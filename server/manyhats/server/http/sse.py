"""Server-sent events, as OpenAI's API streams them (HTML standard, 9.2.6)."""

from __future__ import annotations

import msgspec

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would otherwise collect them
}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients skip and proxies count as life."""


def event(data: object, name: str = "") -> bytes:
    """One event with ``data`` as JSON; ``name`` is its type, "" for none."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, msgspec.json.encode(data))
