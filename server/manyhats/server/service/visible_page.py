"""Pages of a list as seen by the holder of a scoped token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.store.catalogue.page_token import encode_page_token
from manyhats.adapters.store.catalogue.pages import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, Page
from manyhats.server.access.tokens import Scope

if TYPE_CHECKING:
    from manyhats.adapters.store.store import AdapterStore


def visible_page(store: AdapterStore, scope: Scope, *, task_id: str, page_size: int, page_token: str) -> Page:
    """``store.list``, restricted to the scope; its page token reveals nothing outside it either.

    Raises:
        ArgumentInvalidError: an argument is out of range.
    """
    if scope.is_everything:
        return store.list(task_id=task_id, page_size=page_size, page_token=page_token)
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    found: list[AdapterRecord] = []
    for record in _records(store, task_id, page_token):
        if not scope.reaches(record.task_id):
            continue
        if len(found) == size:
            return Page(tuple(found), encode_page_token(task_id, found[-1].task_id, found[-1].version))
        found.append(record)
    return Page(tuple(found), "")


def _records(store: AdapterStore, task_id: str, page_token: str) -> Iterator[AdapterRecord]:
    """All records after a token."""
    while True:
        page = store.list(task_id=task_id, page_size=MAX_PAGE_SIZE, page_token=page_token)
        yield from page.records
        page_token = page.next_page_token
        if not page_token:
            return
