"""Lists of versions, page by page."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import ArgumentInvalidError, TaskIdInvalidError
from manyhats.adapters.taskid import check_task_id

if TYPE_CHECKING:
    from manyhats.adapters.store.catalogue.catalogue import Catalogue

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_MAX_LENGTH = 512
_MAX_VERSION = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; an empty ``next_page_token`` marks the last."""

    records: tuple[AdapterRecord, ...]
    next_page_token: str


def page_length(page_size: int) -> int:
    """How many records a page has at most, if ``page_size`` are asked for; 0 asks for the default.

    Raises:
        ArgumentInvalidError: it is negative.
    """
    if page_size < 0:
        raise ArgumentInvalidError("page_size", "must not be negative")
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def read_page(catalogue: Catalogue, *, task_id: str, page_size: int, page_token: str) -> Page:
    """One page of the list; see ``AdapterStore.list``.

    Raises:
        ArgumentInvalidError: an argument is out of range.
    """
    if task_id:
        check_task_id(task_id)
    size = page_length(page_size)
    after = decode_page_token(page_token, task_id)
    # One more than requested tells whether another page follows.
    records = catalogue.page(task_id=task_id, after=after, max_records=size + 1)
    page = tuple(records[:size])
    more = len(records) > size
    return Page(page, encode_page_token(task_id, page[-1].task_id, page[-1].version) if more else "")


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
