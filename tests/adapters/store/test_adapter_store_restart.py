"""A store that is closed and opened again: nothing of it is lost, and nothing more is in it."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import fsspec
import pytest

from manyhats.adapters.artifact import AdapterState
from manyhats.adapters.errors import (
    NoActiveVersionError,
    RequestIdReusedError,
    StoreConfigError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base
from support.factories.registrations import nobody
from support.factories.uploads import content_of, send

BASE = make_base(names=("org/tiny",))


def reopened(store: AdapterStore, tmp_path: Path) -> AdapterStore:
    store.close()
    return open_store(tmp_path / "store", BASE, [tmp_path / "sources"])


def test_every_record_is_as_it_was(store: AdapterStore, tmp_path: Path) -> None:
    store.register(Registration("fr", Uri("a0"), labels={"team": "x", "é": ""}), probe=lambda lowered: 0.125)
    store.register(Registration("fr", Uri("a1"), activate=False))
    store.register(Registration("de", Parts([Part("a0", 0.3), Part("a1", -2.0)])))
    store.register(Registration("it", Uri("a2"), activate=False))
    before = store.list().records
    again = reopened(store, tmp_path)
    assert again.list().records == before
    assert again.resolve("fr").effect == 0.125
    assert dict(again.get("fr").labels) == {"team": "x", "é": ""}
    assert [record.state for record in again.versions("fr")] == [AdapterState.ACTIVE, AdapterState.INACTIVE]
    with pytest.raises(NoActiveVersionError):
        again.resolve("it")
    for record in before:
        assert again.lower(record).digest == record.digest
    again.close()


def test_what_was_deleted_stays_deleted_and_its_number_used(store: AdapterStore, tmp_path: Path) -> None:
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1")))
    store.delete("fr@2", in_use=nobody)
    again = reopened(store, tmp_path)
    assert [record.name for record in again.versions("fr")] == ["fr@1"]
    again.delete("fr", in_use=nobody)
    again = reopened(again, tmp_path)
    assert again.list().records == ()
    assert os.listdir(tmp_path / "store" / "artifacts") == []
    assert again.register(Registration("fr", Uri("a1"))).record.name == "fr@3"
    again.close()


def test_a_request_id_is_remembered(store: AdapterStore, tmp_path: Path) -> None:
    first = store.register(Registration("fr", Uri("a0"), request_id="r"))
    store.register(Registration("fr", Uri("a1")))
    again = reopened(store, tmp_path)
    assert again.register(Registration("fr", Uri("a0"), request_id="r")) == first
    assert again.get("fr").version == 2
    with pytest.raises(RequestIdReusedError):
        again.register(Registration("fr", Uri("a1"), request_id="r"))
    again.close()


def test_a_rollback_lasts(store: AdapterStore, tmp_path: Path) -> None:
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1")))
    store.activate("fr@1")
    again = reopened(store, tmp_path)
    assert again.get("fr").version == 1
    again.close()


def test_a_store_elsewhere_is_the_same_store(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    store.close()
    (tmp_path / "store").rename(tmp_path / "moved")
    for place in (tmp_path / "moved", f"file://{tmp_path}/moved"):
        moved = open_store(place, BASE)
        assert moved.get("fr") == record
        assert moved.lower(record).digest == record.digest
        moved.close()


def test_another_catalogue_does_not_sweep_what_is_not_its_own(
    store: AdapterStore, tmp_path: Path, sources: Path
) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    store.close()
    with pytest.raises(StoreUnavailableError, match="another catalogue"):
        open_store(tmp_path / "store", BASE, catalogue_url=f"sqlite:///{tmp_path}/other.db")
    again = open_store(tmp_path / "store", BASE)
    assert again.lower(record).digest == record.digest
    again.close()


def test_object_storage_and_a_database_are_a_store_for_several_processes(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    open_replica = partial(
        open_store,
        f"memory://{tmp_path.name}/store",
        BASE,
        [sources],
        catalogue_url=f"sqlite:///{tmp_path}/catalogue.db",
        cache_directory=tmp_path / "cache",
    )
    one, other = open_replica(), open_replica()
    record = send(one, "fr", content_of(sources / "a0")).record
    assert other.refresh() == {"fr"}
    assert other.resolve("fr") == record
    assert other.lower(record).digest == record.digest
    assert [verified.status for verified in other.verify()] == ["ok"]
    other.export("fr", tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(sources / "a0")
    assert other.delete("fr", in_use=nobody) == (record,)
    assert one.refresh() >= {"fr"}
    assert one.list().records == ()
    assert one.gc(older_than_s=0).num_artifacts == 1
    with pytest.raises(TaskNotFoundError):
        open_replica(cache_directory=None).load(record)
    one.close()
    other.close()
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("store", ["s3://bucket/store", "memory://bucket"])
def test_object_storage_needs_a_catalogue_of_its_own(store: str) -> None:
    with pytest.raises(StoreConfigError) as caught:
        open_store(store, BASE)
    assert caught.value.subject == "catalogue_url"


def test_settings_that_cannot_be_are_named(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, object]]] = [
        ("store", {"store": ""}),
        ("store", {"store": tmp_path / "what?"}),
        ("store", {"store": tmp_path / "nothing", "create": False}),
        ("catalogue_url", {"catalogue_url": "mysql://host/db"}),
        ("url_prefixes", {"url_prefixes": ["s3://bucket"]}),
    ]
    for subject, arguments in cases:
        with pytest.raises(StoreConfigError) as caught:
            open_store(**({"store": tmp_path / "store", "base": BASE} | arguments))  # type: ignore[arg-type]
        assert caught.value.subject == subject
        assert str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "nothing").exists()


def test_upkeep_needs_no_base(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    store.close()
    upkeep = open_store(tmp_path / "store", None, create=False)
    assert upkeep.list().records == (record,)
    assert [found.status for found in upkeep.verify()] == ["ok"]
    for call in (lambda: upkeep.register(Registration("fr", Uri("a1"))), lambda: upkeep.lower(record)):
        with pytest.raises(StoreConfigError) as caught:
            call()
        assert caught.value.subject == "base"
    assert upkeep.delete("fr", in_use=nobody) == (record,)
    upkeep.close()
