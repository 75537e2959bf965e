from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.adapters.artifact import AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.errors import (
    AdapterInUseError,
    ArgumentInvalidError,
    DigestMismatchError,
    NoActiveVersionError,
    RequestIdReusedError,
    TaskIdInvalidError,
    TaskNotFoundError,
)
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base, make_lora
from support.factories.registrations import nobody

BASE = make_base(names=("org/tiny",))


def published(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "store" / "artifacts"))


def test_a_registered_adapter_is_active_and_loads_as_it_was(store: AdapterStore, sources: Path) -> None:
    registration = store.register(Registration("fr", Uri(str(sources / "a0")), labels={"team": "x"}))
    record = registration.record
    assert registration.created
    assert (record.name, record.state, record.source) == ("fr@1", AdapterState.ACTIVE, str(sources / "a0"))
    assert record.size_bytes == sum(file.stat().st_size for file in (sources / "a0").iterdir())
    assert record.num_parameters == 2 * (2 * 32 + 32 * 2 + 2 * 32 + 48 * 2)
    assert (record.base_model, dict(record.labels)) == ("org/tiny", {"team": "x"})
    assert store.get("fr") == store.resolve("fr@1") == record
    assert record.parts == (ArtifactPart(record.digest, 1.0, str(sources / "a0")),)
    (artifact,) = store.load(record).artifacts
    assert (artifact.digest, artifact.num_parameters) == (record.digest, record.num_parameters)
    assert len(lower(artifact, BASE).deltas) == 4


def test_the_digest_is_of_the_files_lines(store: AdapterStore, sources: Path) -> None:
    lines = ""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (sources / "a0" / name).read_bytes()
        lines += f"{hashlib.sha256(data).hexdigest()} {len(data)} {name}\n"
    expected = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    assert (
        store.register(Registration("fr", Uri(str(sources / "a0")), expected_digest=expected)).record.digest
        == expected
    )


def test_other_files_of_the_source_are_neither_stored_nor_digested(
    store: AdapterStore, sources: Path, tmp_path: Path
) -> None:
    before = store.register(Registration("fr", Uri("a0"), validate_only=True)).record.digest
    (sources / "a0" / "README.md").write_text("hello")
    torch.save({}, sources / "a0" / "optimizer.pt")
    record = store.register(Registration("fr", Uri("a0"))).record
    assert record.digest == before
    exported = store.export("fr", tmp_path / "exported")
    assert [path.name for path in exported] == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_is_stored_outlives_the_source(store: AdapterStore, sources: Path) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    for file in (sources / "a0").iterdir():
        file.write_bytes(b"spoilt")
    assert store.lower(record).digest == record.digest


def test_the_same_bytes_again_are_the_same_version(
    store: AdapterStore, sources: Path, tmp_path: Path
) -> None:
    first = store.register(Registration("fr", Uri("a0")))
    again = store.register(Registration("fr", Uri(str(sources / "a0"))))
    assert (again.record, again.created) == (first.record, False)
    assert len(published(tmp_path)) == 1


def test_the_same_bytes_again_activate_an_older_version_if_asked(store: AdapterStore) -> None:
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1")))
    assert store.register(Registration("fr", Uri("a0"), activate=False)).record.state is AdapterState.INACTIVE
    assert store.get("fr").version == 2
    assert store.register(Registration("fr", Uri("a0"))).record.state is AdapterState.ACTIVE
    assert store.get("fr").version == 1
    assert [record.state for record in store.versions("fr")] == [AdapterState.ACTIVE, AdapterState.INACTIVE]


def test_versions_count_up_per_task_and_share_files(store: AdapterStore, tmp_path: Path) -> None:
    names = [
        store.register(Registration(task, Uri(uri))).record.name
        for task, uri in [("a", "a0"), ("a", "a1"), ("b", "a0")]
    ]
    assert names == ["a@1", "a@2", "b@1"]
    assert len(published(tmp_path)) == 2


def test_versions_move_forward_and_back(store: AdapterStore) -> None:
    store.register(Registration("fr", Uri("a0")))
    store.register(Registration("fr", Uri("a1"), activate=False))
    assert store.get("fr").version == 1
    assert store.activate("fr@2").state is AdapterState.ACTIVE
    assert store.get("fr").version == 2
    assert store.get("fr@1").state is AdapterState.INACTIVE
    with pytest.raises(ArgumentInvalidError):
        store.activate("fr")
    with pytest.raises(TaskNotFoundError):
        store.activate("fr@3")


def test_names_that_mean_nothing(store: AdapterStore) -> None:
    store.register(Registration("fr", Uri("a0"), activate=False))
    with pytest.raises(NoActiveVersionError):
        store.resolve("fr")
    assert store.resolve("fr@1").version == 1
    for name in ("de", "fr@2", "de@1"):
        with pytest.raises(TaskNotFoundError) as caught:
            store.resolve(name)
        assert caught.value.reason == "TASK_NOT_FOUND"
    with pytest.raises(TaskNotFoundError):
        store.versions("de")
    for call in (store.resolve, store.get, store.versions):
        with pytest.raises(TaskIdInvalidError):
            call("../fr")


def test_validation_alone_stores_nothing(store: AdapterStore, tmp_path: Path) -> None:
    registration = store.register(Registration("fr", Uri("a0"), validate_only=True))
    assert (registration.created, registration.record.version) == (False, 0)
    assert registration.record.num_parameters > 0
    assert published(tmp_path) == set()
    assert store.list().records == ()
    existing = store.register(Registration("fr", Uri("a0"))).record
    assert store.register(Registration("fr", Uri("a0"), validate_only=True)).record == existing


def test_another_digest_than_expected_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatchError, match="sha256:"):
        store.register(Registration("fr", Uri("a0"), expected_digest="sha256:" + "0" * 64))
    assert published(tmp_path) == set()


def test_a_request_id_repeats_its_first_answer(store: AdapterStore, sources: Path) -> None:
    first = store.register(Registration("fr", Uri("a0"), request_id="r1", labels={"a": "b"}))
    make_lora(sources / "a0", BASE, rank=3, seed=9)
    assert store.register(Registration("fr", Uri("a0"), request_id="r1", labels={"a": "b"})) == first
    assert store.register(Registration("fr", Uri("a0"))).record.version == 2


@pytest.mark.parametrize(
    "change",
    [
        {"task_id": "de"},
        {"source": Uri("a1")},
        {"activate": False},
        {"validate_only": True},
        {"labels": {"a": "b"}},
    ],
)
def test_a_request_id_with_another_body_is_refused(store: AdapterStore, change: dict[str, Any]) -> None:
    registration = Registration("fr", Uri("a0"), request_id="r1")
    store.register(registration)
    with pytest.raises(RequestIdReusedError):
        store.register(replace(registration, **change))
    assert len(store.list().records) == 1


def test_a_request_that_failed_may_be_repeated_with_its_id(store: AdapterStore, sources: Path) -> None:
    (sources / "a0" / "adapter_config.json").rename(sources / "kept")
    with pytest.raises(Exception, match="missing"):
        store.register(Registration("fr", Uri("a0"), request_id="r1"))
    (sources / "kept").rename(sources / "a0" / "adapter_config.json")
    assert store.register(Registration("fr", Uri("a0"), request_id="r1")).created


def test_deletion_of_one_version_keeps_the_others(store: AdapterStore, tmp_path: Path) -> None:
    for uri in ("a0", "a1"):
        store.register(Registration("fr", Uri(uri)))
    gone = store.delete("fr@2", in_use=nobody)
    assert [record.name for record in gone] == ["fr@2"]
    with pytest.raises(NoActiveVersionError):
        store.resolve("fr")
    assert store.resolve("fr@1").version == 1
    assert len(published(tmp_path)) == 1


def test_deletion_of_a_task_removes_its_files_and_never_reuses_its_names(
    store: AdapterStore, tmp_path: Path
) -> None:
    for uri in ("a0", "a1"):
        store.register(Registration("fr", Uri(uri)))
    assert [record.name for record in store.delete("fr", in_use=nobody)] == ["fr@1", "fr@2"]
    assert published(tmp_path) == set()
    for name in ("fr", "fr@1"):
        with pytest.raises(TaskNotFoundError):
            store.resolve(name)
        with pytest.raises(TaskNotFoundError):
            store.delete(name, in_use=nobody)
    assert store.register(Registration("fr", Uri("a0"))).record.name == "fr@3"


def test_files_stay_while_another_task_needs_them(store: AdapterStore) -> None:
    store.register(Registration("a", Uri("a0")))
    other = store.register(Registration("b", Uri("a0"))).record
    store.delete("a", in_use=nobody)
    assert store.lower(other).digest == other.digest


def test_a_version_in_use_is_deleted_by_force_only(store: AdapterStore) -> None:
    for uri in ("a0", "a1"):
        store.register(Registration("fr", Uri(uri)))

    def in_use(record: AdapterRecord) -> bool:
        return record.version == 1

    for name in ("fr", "fr@1"):
        with pytest.raises(AdapterInUseError) as caught:
            store.delete(name, in_use=in_use)
        assert caught.value.subject == "fr@1"
    assert len(store.versions("fr")) == 2
    assert len(store.delete("fr@2", in_use=in_use)) == 1
    assert len(store.delete("fr", in_use=in_use, force=True)) == 1


def test_loading_after_deletion_says_that_it_is_gone(store: AdapterStore) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    store.delete("fr", in_use=nobody)
    with pytest.raises(TaskNotFoundError):
        store.load(record)
