"""Each call to the disk and the database fails once, in each operation: old or new, never half, and no orphans."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base
from support.factories.registrations import nobody
from support.factories.uploads import content_of, send
from support.harnesses.failing_calls import FailingCalls, failing

BASE = make_base(names=("org/tiny",))

Operation = Callable[[AdapterStore, Mapping[str, bytes]], object]

OPERATIONS: dict[str, Operation] = {
    "register": lambda store, content: store.register(Registration("fr", Uri("a2"))),
    "register again": lambda store, content: store.register(Registration("fr", Uri("a1"))),
    "register with a request id": lambda store, content: store.register(
        Registration("fr", Uri("a2"), request_id="r")
    ),
    "compose": lambda store, content: store.register(Registration("fr", Parts([Part("a0"), Part("a2")]))),
    "upload": lambda store, content: send(store, "fr", content),
    "activate": lambda store, content: store.activate("fr@2"),
    "delete a version": lambda store, content: store.delete("fr@1", in_use=nobody),
    "delete a task": lambda store, content: store.delete("fr", in_use=nobody),
}


@pytest.fixture
def prepared(store: AdapterStore, tmp_path: Path) -> Path:
    """A closed store of one task with two versions, of which the first is active."""
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1"), activate=False))
    store.close()
    return tmp_path / "store"


def open_copy(prepared: Path, number: int) -> tuple[AdapterStore, Path]:
    directory = prepared.with_name(f"copy-{number}")
    shutil.copytree(prepared, directory)
    return open_store(directory, BASE, [prepared.parent / "sources"]), directory


def seen(store: AdapterStore) -> list[tuple[str, str, str]]:
    return [(record.name, record.digest, record.state.value) for record in store.list().records]


def needed(records: tuple[AdapterRecord, ...]) -> set[str]:
    return {part.digest.removeprefix("sha256:") for record in records for part in record.parts}


@pytest.mark.parametrize(
    ("name", "stays"),
    [*((name, False) for name in OPERATIONS), ("compose", True), ("upload", True), ("delete a task", True)],
)
def test_every_failing_call_leaves_the_old_or_the_new(
    prepared: Path, sources: Path, name: str, stays: bool
) -> None:
    operation, content = OPERATIONS[name], content_of(sources / "a2")
    store, directory = open_copy(prepared, 0)
    old = seen(store)
    operation(store, content)
    new = seen(store)
    store.close()
    for number in itertools.count(1):
        store, directory = open_copy(prepared, number)
        calls = FailingCalls(number, stays)
        is_done = True
        with failing(calls):
            try:
                operation(store, content)
            except AdapterError:
                is_done = False
        assert seen(store) in ([new] if is_done else [old, new])
        before = seen(store)
        store.close()
        reopened = open_store(directory, BASE)
        records = reopened.list().records
        assert seen(reopened) == before
        assert set(os.listdir(directory / "artifacts")) == needed(records)
        assert os.listdir(directory / "staging") == os.listdir(directory / "scratch") == []
        assert [reopened.lower(record).digest for record in records] == [record.digest for record in records]
        reopened.close()
        shutil.rmtree(directory)
        if not calls.failed:
            return
