"""Page tokens: where a list goes on. Opaque to callers; they stay good while versions come and go."""

from __future__ import annotations

import base64
import json

from manyhats.adapters.errors import ArgumentInvalidError

_MAX_LENGTH = 512


def encode_page_token(filter_task_id: str, task_id: str, version: int) -> str:
    """The token of the page behind (task id, version), in a list filtered by ``filter_task_id``."""
    return (
        base64.urlsafe_b64encode(json.dumps([filter_task_id, task_id, version]).encode()).decode().rstrip("=")
    )


def decode_page_token(token: str, filter_task_id: str) -> tuple[str, int]:
    """The (task id, version) that a page begins behind; an empty token is the first page.

    Raises:
        ArgumentInvalidError: the token is not one of ours, or is of a list with another filter.
    """
    if not token:
        return ("", 0)
    try:
        if len(token) > _MAX_LENGTH:
            raise ValueError("too long")
        padded = token + "=" * (-len(token) % 4)
        made_for, task_id, version = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, TypeError, RecursionError):
        raise ArgumentInvalidError("page_token", "is not a token that this server gave") from None
    if not isinstance(task_id, str) or type(version) is not int:
        raise ArgumentInvalidError("page_token", "is not a token that this server gave")
    if made_for != filter_task_id:
        raise ArgumentInvalidError("page_token", "was given for a list with another task_id")
    return (task_id, version)
