"""Lists of versions, page by page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.store.catalogue.page_token import decode_page_token, encode_page_token
from manyhats.adapters.taskid import check_task_id

if TYPE_CHECKING:
    from manyhats.adapters.store.catalogue.catalogue import Catalogue

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; an empty ``next_page_token`` marks the last."""

    records: tuple[AdapterRecord, ...]
    next_page_token: str


def read_page(catalogue: Catalogue, *, task_id: str, page_size: int, page_token: str) -> Page:
    """One page of the list; see ``AdapterStore.list``.

    Raises:
        ArgumentInvalidError: an argument is out of range.
    """
    if task_id:
        check_task_id(task_id)
    if page_size < 0:
        raise ArgumentInvalidError("page_size", "must not be negative")
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    after = decode_page_token(page_token, task_id)
    # One more than requested tells whether another page follows.
    records = catalogue.page(task_id=task_id, after=after, max_records=size + 1)
    page = tuple(records[:size])
    more = len(records) > size
    return Page(page, encode_page_token(task_id, page[-1].task_id, page[-1].version) if more else "")
