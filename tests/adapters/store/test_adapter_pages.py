from __future__ import annotations

import pytest

from manyhats.adapters.errors import (
    ArgumentInvalidError,
)
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.store import AdapterStore
from support.factories.registrations import nobody


def test_pages_cover_the_list_once_in_order(store: AdapterStore) -> None:
    names = [
        store.register(Registration(task, Uri(uri))).record.name
        for task in ("b", "a", "c")
        for uri in ("a0", "a1", "a2")
    ]
    seen: list[str] = []
    token = ""
    while True:
        page = store.list(page_size=2, page_token=token)
        seen += [record.name for record in page.records]
        token = page.next_page_token
        if not token:
            break
        assert len(page.records) == 2
    assert seen == sorted(names)
    assert [record.name for record in store.list(task_id="b").records] == ["b@1", "b@2", "b@3"]
    assert store.list(task_id="nothing").records == ()
    assert store.list(page_size=9).next_page_token == ""


def test_pages_of_one_task_end_with_it(store: AdapterStore) -> None:
    for task in ("a", "b"):
        for uri in ("a0", "a1", "a2"):
            store.register(Registration(task, Uri(uri)))
    first = store.list(task_id="a", page_size=2)
    second = store.list(task_id="a", page_size=2, page_token=first.next_page_token)
    assert [record.name for record in (*first.records, *second.records)] == ["a@1", "a@2", "a@3"]
    assert second.next_page_token == ""


def test_page_tokens_stay_good_while_versions_come_and_go(store: AdapterStore) -> None:
    for task in ("b", "d", "f"):
        store.register(Registration(task, Uri("a0")))
    token = store.list(page_size=2).next_page_token
    store.delete("d", in_use=nobody)
    store.register(Registration("a", Uri("a0")))
    store.register(Registration("e", Uri("a0")))
    assert [record.task_id for record in store.list(page_token=token).records] == ["e", "f"]


@pytest.mark.parametrize(
    "token", ["x", "!!!!", "e30", "W10", "WzEsMiwzXQ", "é", "A" * 600, "WyIiLCAiYSIsIHRydWVd"]
)
def test_foreign_page_tokens_are_refused(store: AdapterStore, token: str) -> None:
    with pytest.raises(ArgumentInvalidError) as caught:
        store.list(page_token=token)
    assert caught.value.subject == "page_token"


def test_a_page_token_belongs_to_its_filter(store: AdapterStore) -> None:
    for uri in ("a0", "a1"):
        store.register(Registration("a", Uri(uri)))
    token = store.list(page_size=1).next_page_token
    with pytest.raises(ArgumentInvalidError):
        store.list(task_id="a", page_token=token)
    with pytest.raises(ArgumentInvalidError):
        store.list(page_size=-1)
