"""What a JSON text consists of, told from its bytes: before anything is made of it, or without a walk through it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from manyhats.server.service.text_threads import byte_slices

_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_DEPTH_CHANGES = bytes.maketrans(b"{[}]", bytes([2, 2, 0, 0]))


def outlines(text: bytes) -> Iterator[bytes]:
    """The text without what is in its strings, piece by piece; each string is one double quote.

    Others get the interpreter lock between two pieces.
    """
    is_inside, half_escape = False, b""
    for piece in byte_slices(text):
        whole = half_escape + piece
        end = len(whole) - (len(whole) - len(whole.rstrip(b"\\"))) % 2
        whole, half_escape = whole[:end], whole[end:]
        parts = whole.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = parts[is_inside::2]
        is_inside ^= len(parts) % 2 == 0
        if is_inside and len(parts) > 1:
            outside.append(b"")  # after the string that has begun
        yield b'"'.join(outside)


def depth_of(text: bytes) -> int:
    """How deep its objects and lists are nested."""
    depth = deepest = 0
    for piece in outlines(text):
        changes = piece.translate(_DEPTH_CHANGES, _NOT_BRACKETS)
        depths = list(accumulate((change - 1 for change in changes), initial=depth))
        depth, deepest = depths[-1], max(deepest, *depths)
    return deepest
