"""Uploads from both clients, over a real port."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from manyhats.adapters.formats.artifact_files import FILES
from manyhats.client import (
    AdapterUnsafeError,
    AsyncClient,
    Client,
    InvalidRequestError,
    Progress,
    Registration,
    UnavailableError,
)
from manyhats.client.upload import CHUNK_BYTES, HEAD_FILES, TEXT_FILES, read_files
from support.fakes.client import FakeServer, make_status

Upload = Callable[[str, Path, Progress | None], Registration]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory with an adapter, and with files that are no part of it."""
    directory = tmp_path / "sql"
    (directory / "checkpoint-10").mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(2 * CHUNK_BYTES + 5))
    for name in ("README.md", "optimizer.pt", "training_args.bin", "vocab.json"):
        (directory / name).write_text("no part of it")
    for name in TEXT_FILES:
        (directory / name).write_text(f"{name} of the adapter's own")
    return directory


@pytest.fixture(params=["sync", "async"])
def upload(request: pytest.FixtureRequest) -> Upload:
    """``upload_adapter`` of either client."""

    def of_sync(target: str, directory: Path, progress: Progress | None) -> Registration:
        with Client(target) as client:
            return client.upload_adapter("sql", directory, progress=progress, labels={"team": "a"})

    def of_async(target: str, directory: Path, progress: Progress | None) -> Registration:
        async def run() -> Registration:
            async with AsyncClient(target) as client:
                return await client.upload_adapter("sql", directory, progress=progress, labels={"team": "a"})

        return asyncio.run(run())

    return of_sync if request.param == "sync" else of_async


def test_the_client_sends_every_file_that_the_store_keeps(adapter: Path) -> None:
    (adapter / "adapter.safetensors").write_bytes(b"weights")
    for name in HEAD_FILES:
        (adapter / name).write_bytes(b"head")
    assert {file.info.name for file in read_files(adapter)} == set(FILES)


def test_a_directory_of_links_is_sent_as_the_files_they_lead_to(
    fake: FakeServer, upload: Upload, adapter: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in adapter.iterdir():
        (snapshot / path.name).symlink_to(Path("../../..") / adapter.name / path.name)
    upload(fake.target, snapshot, None)
    assert {name: bytes(data) for name, data in fake.uploaded.items()} == {
        name: (adapter / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors", *TEXT_FILES)
    }


def test_files_of_the_adapter_arrive_whole_and_nothing_else(
    fake: FakeServer, upload: Upload, adapter: Path
) -> None:
    seen: list[tuple[int, int]] = []
    registration = upload(fake.target, adapter, lambda sent, total: seen.append((sent, total)))
    assert registration.adapter.name == "sql@3"
    assert {name: bytes(data) for name, data in fake.uploaded.items()} == {
        name: (adapter / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors", *TEXT_FILES)
    }
    assert fake.largest_chunk == CHUNK_BYTES
    assert (fake.last_request.task_id, dict(fake.last_request.labels)) == ("sql", {"team": "a"})
    total = sum(len(data) for data in fake.uploaded.values())
    assert [sent for sent, _ in seen] == sorted({sent for sent, _ in seen})
    assert seen[-1] == (total, total)


def test_files_are_announced_with_size_and_hash(adapter: Path) -> None:
    config, weights, *text = read_files(adapter)
    assert (config.info.name, config.info.size_bytes) == ("adapter_config.json", 2)
    assert config.info.sha256 == hashlib.sha256(b"{}").hexdigest()
    assert weights.info.size_bytes == 2 * CHUNK_BYTES + 5
    assert [file.info.name for file in text] == list(TEXT_FILES)


def test_an_adapter_without_text_files_is_sent_as_it_is(adapter: Path) -> None:
    for name in TEXT_FILES:
        (adapter / name).unlink()
    assert [file.info.name for file in read_files(adapter)] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_servers_refusal_ends_the_upload(fake: FakeServer, upload: Upload, adapter: Path) -> None:
    fake.status = make_status(grpc.StatusCode.INVALID_ARGUMENT, "a pickle", reason="ADAPTER_UNSAFE")
    with pytest.raises(AdapterUnsafeError, match="a pickle"):
        upload(fake.target, adapter, None)
    assert fake.uploaded == {}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("adapter_config.json", "has no adapter_config.json"),
        ("adapter_model.safetensors", "manyhats adapters convert"),
    ],
)
def test_directory_without_an_adapter_never_asks_the_server(
    fake: FakeServer, upload: Upload, adapter: Path, missing: str, message: str
) -> None:
    (adapter / missing).unlink()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        upload(fake.target, adapter, None)
    assert caught.value.field == "directory"
    assert fake.requests == []


def test_directory_that_is_not_there_is_named(fake: FakeServer, upload: Upload, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="nowhere: No such file"):
        upload(fake.target, tmp_path / "nowhere", None)


@pytest.mark.parametrize("size_bytes", [CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_file_that_changes_while_it_is_sent_fails_the_upload(
    fake: FakeServer, upload: Upload, adapter: Path, size_bytes: int
) -> None:
    def change(sent: int, total: int) -> None:
        os.truncate(adapter / "adapter_model.safetensors", size_bytes)

    with pytest.raises(InvalidRequestError, match="changed while it was sent"):
        upload(fake.target, adapter, change)
    assert fake.uploaded == {}


def test_error_of_the_callers_progress_comes_back_as_it_is(
    fake: FakeServer, upload: Upload, adapter: Path
) -> None:
    def fail(sent: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        upload(fake.target, adapter, fail)
    assert fake.uploaded == {}


def test_unreachable_server_is_named(upload: Upload, adapter: Path) -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        upload("127.0.0.1:1", adapter, None)


async def test_cancelling_the_task_cancels_the_upload_on_the_server(fake: FakeServer, adapter: Path) -> None:
    fake.is_endless = True
    async with AsyncClient(fake.target) as client:
        uploading = asyncio.create_task(client.upload_adapter("sql", adapter))
        assert await asyncio.to_thread(fake.stream_began.wait, 5)
        assert not fake.stream_ended.is_set()
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        assert await asyncio.to_thread(fake.stream_ended.wait, 5)
    assert fake.uploaded == {}
