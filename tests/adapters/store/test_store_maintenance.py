from __future__ import annotations

import os
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import (
    ArgumentInvalidError,
    DataLossError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.maintenance import Verified
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.registrations import nobody
from support.factories.uploads import content_of


def stored(tmp_path: Path, record: AdapterRecord, part: int = 0) -> Path:
    """The stored tensors of a version."""
    digits = record.parts[part].digest.removeprefix("sha256:")
    return tmp_path / "store" / "artifacts" / digits / "adapter_model.safetensors"


def spoil(file: Path) -> bytes:
    """Turn one bit; gives the content as it was."""
    content = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return content


def found(store: AdapterStore) -> dict[str, Verified]:
    return {verified.digest: verified for verified in store.verify()}


def test_whole_artifacts_are_verified_once_each(store: AdapterStore) -> None:
    plain = store.register(Registration("fr", Uri("a0"))).record
    store.register(Registration("de", Uri("a0")))
    composed = store.register(Registration("fr", Parts([Part("a0", 0.5), Part("a1")]))).record
    assert found(store) == {
        plain.digest: Verified(plain.digest, "ok", ("de@1", "fr@1", "fr@2")),
        composed.parts[1].digest: Verified(composed.parts[1].digest, "ok", ("fr@2",)),
    }
    assert {record.state for record in store.list().records} == {AdapterState.ACTIVE, AdapterState.INACTIVE}


def test_damage_is_found_and_fails_every_version_that_needs_the_bytes(
    store: AdapterStore, tmp_path: Path
) -> None:
    damaged = store.register(Registration("fr", Uri("a0"))).record
    missing = store.register(Registration("de", Uri("a1"))).record
    composed = store.register(Registration("it", Parts([Part("a0"), Part("a2")]))).record
    spoil(stored(tmp_path, damaged))
    stored(tmp_path, missing).unlink()
    stored(tmp_path, missing).with_name("adapter_config.json").unlink()
    stored(tmp_path, missing).parent.rmdir()
    verified = found(store)
    assert verified[damaged.digest] == Verified(damaged.digest, "damaged", ("fr@1", "it@1"))
    assert verified[missing.digest].status == "missing"
    assert verified[composed.parts[1].digest].status == "ok"
    for name, reason in (("fr", "damaged"), ("it", "damaged"), ("de", "missing")):
        record = store.get(name)
        assert (record.state, record.state_reason) == (AdapterState.FAILED, f"its stored files are {reason}")
        with pytest.raises(DataLossError):
            store.activate(record.name)
        with pytest.raises(DataLossError) as caught:
            store.load(record)
        assert caught.value.subject == record.name


def test_what_is_whole_again_is_good_again(store: AdapterStore, tmp_path: Path) -> None:
    restored = store.register(Registration("fr", Uri("a0"))).record
    registered = store.register(Registration("de", Uri("a1"))).record
    content = spoil(stored(tmp_path, restored))
    spoil(stored(tmp_path, registered))
    assert {verified.status for verified in store.verify()} == {"damaged"}
    stored(tmp_path, restored).write_bytes(content)
    assert store.register(Registration("de", Uri("a1"))).record == registered
    assert {verified.status for verified in store.verify()} == {"ok"}
    assert store.get("fr") == restored
    assert store.get("de") == registered
    assert store.lower(registered).digest == registered.digest


def test_what_is_deleted_while_it_is_verified_is_not_missed(store: AdapterStore) -> None:
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("de", Uri("a1")))
    verifying = store.verify()
    first = next(verifying)
    gone = {"fr@1", "de@1"} - set(first.names)
    store.delete(gone.pop(), in_use=nobody)
    assert list(verifying) == []
    assert [record.state for record in store.list().records] == [AdapterState.ACTIVE]


def test_a_storage_that_cannot_be_read_fails_no_version(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record

    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StoreUnavailableError):
            list(store.verify())
    assert store.get("fr") == record


def test_garbage_is_collected_and_counted(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    orphan = tmp_path / "store" / "artifacts" / ("0" * 64)
    orphan.mkdir()
    (orphan / "file").write_bytes(bytes(100))
    swept = store.gc()
    assert (swept.num_artifacts, swept.size_bytes) == (1, 100)
    assert store.gc().num_artifacts == 0
    assert not orphan.exists()
    assert store.lower(record).digest == record.digest


def test_a_store_may_be_opened_without_a_sweep(store: AdapterStore, tmp_path: Path) -> None:
    store.close()
    orphan = tmp_path / "store" / "artifacts" / ("0" * 64)
    orphan.mkdir()
    upkeep = open_store(tmp_path / "store", None, sweep=False)
    assert orphan.exists()
    assert upkeep.gc().num_artifacts == 1
    upkeep.close()


def test_a_version_is_exported_as_it_was_registered(
    store: AdapterStore, tmp_path: Path, sources: Path
) -> None:
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1")))
    target = tmp_path / "out" / "fr"
    paths = store.export("fr@1", target)
    assert content_of(target) == content_of(sources / "a0")
    assert sorted(paths) == sorted(target.iterdir())
    again = store.register(Registration("again", Uri("a0"))).record
    store.export("again", tmp_path / "again")
    assert content_of(tmp_path / "again") == content_of(target)
    assert again.digest == store.get("fr@1").digest


def test_the_parts_of_a_composed_version_are_exported_side_by_side(
    store: AdapterStore, tmp_path: Path, sources: Path
) -> None:
    store.register(Registration("fr", Parts([Part("a1", 0.5), Part("a0")])))
    (tmp_path / "out").mkdir()
    assert len(store.export("fr", tmp_path / "out")) == 4
    assert sorted(os.listdir(tmp_path / "out")) == ["part-0", "part-1"]
    assert content_of(tmp_path / "out" / "part-0") == content_of(sources / "a1")
    assert content_of(tmp_path / "out" / "part-1") == content_of(sources / "a0")


def test_an_export_overwrites_nothing_and_is_whole_or_fails(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register(Registration("fr", Parts([Part("a0"), Part("a1")]))).record
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(ArgumentInvalidError, match="not empty"):
        store.export("fr", tmp_path / "full")
    with pytest.raises(TaskNotFoundError):
        store.export("de", tmp_path / "out")
    with pytest.raises(StoreUnavailableError):
        store.export("fr", tmp_path / "full" / "notes" / "out")
    spoil(stored(tmp_path, record, part=1))
    with pytest.raises(DataLossError) as caught:
        store.export("fr", tmp_path / "out")
    assert caught.value.subject == "fr@1"
    assert not (tmp_path / "out").exists()
