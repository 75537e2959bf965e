"""Page tokens: where a list continues. Opaque to callers; they stay valid while versions are added and removed."""

from __future__ import annotations

import base64
import json

from manyhats.adapters.errors import ArgumentInvalidError, TaskIdInvalidError
from manyhats.adapters.taskid import check_task_id

_MAX_LENGTH = 512
_MAX_VERSION = 2**31 - 1


def encode_page_token(filter_task_id: str, task_id: str, version: int) -> str:
    """The token of the page after (task id, version), in a list filtered by ``filter_task_id``."""
    return (
        base64.urlsafe_b64encode(json.dumps([filter_task_id, task_id, version]).encode()).decode().rstrip("=")
    )


def decode_page_token(token: str, filter_task_id: str) -> tuple[str, int]:
    """The (task id, version) that a page begins after; an empty token is the first page.

    Raises:
        ArgumentInvalidError: the token is not one of ours, or is from a list with another filter.
    """
    if not token:
        return ("", 0)
    try:
        made_for, task_id, version = _fields(token)
    except (ValueError, TypeError, RecursionError, TaskIdInvalidError):
        raise ArgumentInvalidError("page_token", "is not a token from this server") from None
    if made_for != filter_task_id:
        raise ArgumentInvalidError("page_token", "is from a list with another task_id")
    return (task_id, version)


def _fields(token: str) -> tuple[str, str, int]:
    """The content of a token; raises if it cannot be one of ours."""
    if len(token) > _MAX_LENGTH:
        raise ValueError("too long")
    padded = token + "=" * (-len(token) % 4)
    made_for, task_id, version = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    if not isinstance(made_for, str) or not isinstance(task_id, str):
        raise TypeError("a task id is text")
    if type(version) is not int or not 0 < version <= _MAX_VERSION:
        raise ValueError("no version")
    return (made_for and check_task_id(made_for), check_task_id(task_id), version)
