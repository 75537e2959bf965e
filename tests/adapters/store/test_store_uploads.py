"""Uploads into a store: what they come to is what registration of the same files comes to."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterState, ArtifactPart
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    ArgumentInvalidError,
    BaseMismatchError,
    DigestMismatchError,
    QuotaExceededError,
    RequestIdReusedError,
    TaskIdInvalidError,
)
from manyhats.adapters.limits import AdapterLimits, Quotas
from manyhats.adapters.registration import Files, Registered, Registration, Unannounced, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base, make_lora
from support.factories.uploads import announced, content_of, send

BASE = make_base(names=("org/tiny",))


def traces(tmp_path: Path) -> list[str]:
    """What lies in the store of artifacts and of what is on its way."""
    return os.listdir(tmp_path / "store" / "artifacts") + os.listdir(tmp_path / "store" / "scratch")


def test_an_upload_becomes_what_registration_would_make_of_it(
    store: AdapterStore, sources: Path, tmp_path: Path
) -> None:
    registration = send(store, "fr", content_of(sources / "a0"), labels={"team": "x"})
    registered = store.register(Registration("de", Uri("a0"))).record
    record = registration.record
    assert registration.created
    assert (record.name, record.state, record.source) == ("fr@1", AdapterState.ACTIVE, "upload")
    assert record.parts == (ArtifactPart(registered.digest, 1.0, "upload"),)
    assert (record.digest, record.size_bytes) == (registered.digest, registered.size_bytes)
    assert dict(record.labels) == {"team": "x"}
    assert store.lower(record).digest == record.digest
    assert os.listdir(tmp_path / "store" / "scratch") == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 3000))
def test_any_order_and_size_of_pieces_gives_the_same_digest(
    store: AdapterStore, sources: Path, seed: int, piece_bytes: int
) -> None:
    content = content_of(sources / "a0")
    expected = store.register(Registration("fr", Uri("a0"))).record.digest
    pieces = [
        (index, offset, data[offset : offset + piece_bytes])
        for index, data in enumerate(content.values())
        for offset in range(0, len(data), piece_bytes)
    ]
    random.Random(seed).shuffle(pieces)
    with store.open_upload(Registration("fr", Files(announced(content)), validate_only=True)) as session:
        for piece in itertools.islice(pieces, 4000):
            session.write(*piece)
        assert session.finish().record.digest == expected


def test_nothing_is_visible_until_the_last_byte(store: AdapterStore, sources: Path, tmp_path: Path) -> None:
    content = content_of(sources / "a0")
    session = store.open_upload(Registration("fr", Files(announced(content))))
    for index, data in enumerate(content.values()):
        session.write(index, 0, data[:-1])
    assert store.list().records == ()
    with pytest.raises(ArgumentInvalidError, match="incomplete"):
        session.finish()
    assert traces(tmp_path) == []


def test_an_upload_that_broke_off_may_be_repeated_whole(store: AdapterStore, sources: Path) -> None:
    content = content_of(sources / "a0")
    with store.open_upload(Registration("fr", Files(announced(content)), request_id="r")) as session:
        session.write(0, 0, b"{")
    first = send(store, "fr", content, request_id="r")
    again = send(store, "fr", content, request_id="r", piece_bytes=100)
    assert (first.created, again) == (True, first)
    assert send(store, "fr", content).record == first.record
    with pytest.raises(RequestIdReusedError):
        send(store, "fr", content_of(sources / "a1"), request_id="r")
    with pytest.raises(RequestIdReusedError):
        store.register(Registration("fr", Uri("a0"), request_id="r"))


def test_what_arrives_is_validated_as_any_source(store: AdapterStore, sources: Path, tmp_path: Path) -> None:
    broken = dict(content_of(sources / "a0")) | {"adapter_config.json": b"{}"}
    with pytest.raises(AdapterInvalidError):
        send(store, "fr", broken)
    make_lora(sources / "other", BASE, base_model_name_or_path="org/other")
    with pytest.raises(BaseMismatchError):
        send(store, "fr", content_of(sources / "other"))
    assert traces(tmp_path) == []


def test_a_spoilt_transfer_is_told_from_a_bad_adapter(
    store: AdapterStore, sources: Path, tmp_path: Path
) -> None:
    content = content_of(sources / "a0")
    with store.open_upload(Registration("fr", Files(announced(content)))) as session:
        session.write(0, 0, b"x" * len(content["adapter_config.json"]))
        session.write(1, 0, content["adapter_model.safetensors"])
        with pytest.raises(DigestMismatchError) as caught:
            session.finish()
    assert caught.value.subject == "adapter_config.json"
    assert traces(tmp_path) == []


def test_the_header_is_checked_before_a_byte_is_taken(tmp_path: Path, sources: Path) -> None:
    files = announced(content_of(sources / "a0"))
    size = sum(file.size_bytes for file in files)
    quotas = Quotas(max_versions_per_task=1, max_transfers=1)
    limits = AdapterLimits(max_size_bytes=size)
    store = open_store(tmp_path / "store", BASE, [sources], quotas=quotas, limits=limits)
    larger = [files[0], *(type(file)(file.name, file.size_bytes + 1, file.sha256) for file in files[1:])]
    with pytest.raises(AdapterTooLargeError):
        store.open_upload(Registration("fr", Files(larger)))
    with pytest.raises(TaskIdInvalidError):
        store.open_upload(Registration("../fr", Files(files)))
    with pytest.raises(DigestMismatchError):
        store.open_upload(Registration("fr", Files(files), expected_digest="sha256:" + "0" * 64))
    with pytest.raises(ArgumentInvalidError):
        store.open_upload(Registration("fr", Files(files), labels={"": ""}))
    with store.open_upload(Registration("fr", Files(files))), pytest.raises(QuotaExceededError) as caught:
        store.open_upload(Registration("de", Files(files)))
    assert caught.value.subject == "max_transfers"
    store.register(Registration("fr", Uri("a1")))
    with pytest.raises(QuotaExceededError) as caught:
        store.open_upload(Registration("fr", Files(files)))
    assert caught.value.subject == "max_versions_per_task"
    assert os.listdir(tmp_path / "store" / "scratch") == []
    store.close()


def test_files_come_in_an_upload_and_nothing_else_does(store: AdapterStore, sources: Path) -> None:
    files = Files(announced(content_of(sources / "a0")))
    for call in (
        lambda: store.register(Registration("fr", files)),
        lambda: store.open_upload(Registration("fr", Uri("a0"))),
    ):
        with pytest.raises(ArgumentInvalidError) as caught:
            call()
        assert caught.value.subject == "files"
    assert store.list().records == ()


def test_what_the_task_has_already_is_over_no_quota(tmp_path: Path, sources: Path) -> None:
    store = open_store(
        tmp_path / "store", BASE, [sources], quotas=Quotas(max_versions_per_task=1, max_tasks=1)
    )
    first = store.register(Registration("fr", Uri("a0"))).record
    assert send(store, "fr", content_of(sources / "a0")).record == first
    assert store.register(Registration("fr", Uri("a0"))).record == first
    store.close()


@pytest.mark.parametrize(
    ("quotas", "subject"),
    [
        ({"max_tasks": 1}, "max_tasks"),
        ({"max_versions_per_task": 1}, "max_versions_per_task"),
        ({"max_bytes_per_task": 1}, "max_bytes_per_task"),
        ({"max_bytes": 1}, "max_bytes"),
    ],
)
def test_quotas_hold_for_every_way_in_and_leave_no_bytes(
    tmp_path: Path, sources: Path, quotas: dict[str, int], subject: str
) -> None:
    size = sum(file.stat().st_size for file in (sources / "a0").iterdir())
    scaled = {name: value * size if "bytes" in name else value for name, value in quotas.items()}
    store = open_store(tmp_path / "store", BASE, [sources], quotas=Quotas(**scaled))
    store.register(Registration("fr", Uri("a0")))
    task = "fr" if "per_task" in subject else "de"
    before = traces(tmp_path)
    for way in (
        lambda: store.register(Registration(task, Uri("a1"))),
        lambda: store.register(Registration(task, Uri("a1"), validate_only=True)),
        lambda: send(store, task, content_of(sources / "a1")),
    ):
        with pytest.raises(QuotaExceededError) as caught:
            way()
        assert caught.value.subject == subject
    assert traces(tmp_path) == before
    store.delete("fr", in_use=lambda record: False)
    assert store.register(Registration(task, Uri("a1"))).created
    store.close()


@pytest.mark.parametrize("quota", ["max_tasks", "max_versions_per_task", "max_bytes", "max_transfers"])
def test_a_quota_is_at_least_one(quota: str) -> None:
    with pytest.raises(ValueError, match=quota):
        Quotas(**{quota: 0})


def send_unannounced(store: AdapterStore, content: Mapping[str, bytes], **options: Any) -> Registered:
    """Upload files that were not announced, in pieces."""
    with store.open_upload(Registration("fr", Unannounced(), **options)) as session:
        for index, (name, data) in enumerate(content.items()):
            session.open_file(name)
            for offset in range(0, len(data), 5000):
                session.write(index, offset, data[offset : offset + 5000])
        return session.finish()


def test_files_that_were_not_announced_become_the_same_version(store: AdapterStore, sources: Path) -> None:
    content = content_of(sources / "a0")
    first = send(store, "fr", content, request_id="r")
    again = send_unannounced(store, content, request_id="r")
    assert (first.created, again) == (True, first)
    assert send_unannounced(store, content).record == first.record
    with pytest.raises(RequestIdReusedError):
        send_unannounced(store, content_of(sources / "a1"), request_id="r")
    with pytest.raises(DigestMismatchError):
        send_unannounced(store, content_of(sources / "a1"), expected_digest=first.record.digest)


@pytest.mark.parametrize(
    ("content", "error", "subject"),
    [
        ({"adapter_config.json": b"{}"}, AdapterInvalidError, "adapter_model.safetensors"),
        ({"adapter_config.json": b"", "adapter_model.safetensors": b"x"}, AdapterInvalidError, "config"),
        ({"adapter_model.bin": b"x"}, AdapterUnsafeError, "adapter_model.bin"),
        ({"../x.json": b"x"}, ArgumentInvalidError, "files"),
        ({"adapter_config.json": bytes(3_000_000)}, AdapterTooLargeError, "adapter_config.json"),
    ],
)
def test_files_that_were_not_announced_are_checked_as_they_come(
    store: AdapterStore, tmp_path: Path, content: dict[str, bytes], error: type[AdapterError], subject: str
) -> None:
    with pytest.raises(error) as caught:
        send_unannounced(store, content)
    assert subject in caught.value.subject
    assert traces(tmp_path) == []


def test_only_a_session_for_such_files_takes_one_that_was_not_announced(
    store: AdapterStore, sources: Path
) -> None:
    content = content_of(sources / "a0")
    with (
        store.open_upload(Registration("fr", Files(announced(content)))) as session,
        pytest.raises(ArgumentInvalidError, match="not announced"),
    ):
        session.open_file("tokenizer.json")
    with store.open_upload(Registration("fr", Unannounced())) as session:
        session.open_file("adapter_config.json")
        with pytest.raises(ArgumentInvalidError, match="twice"):
            session.open_file("adapter_config.json")
        with pytest.raises(ArgumentInvalidError, match="must be 0"):
            session.write(0, 5, b"x")
    with pytest.raises(ArgumentInvalidError):
        store.register(Registration("fr", Unannounced()))
