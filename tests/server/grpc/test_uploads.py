"""UploadAdapter over a real port: on a store in memory, how a call goes; on a real one, what becomes of the bytes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from manyhats.adapters.limits import AdapterLimits, Quotas
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.server.grpc.adapters import UploadMessages
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.errors import UploadStalledError
from manyhats.server.service.registrations import Registrations
from manyhats.server.service.uploads import take_upload
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from support.factories.adapters import make_base, make_lora
from support.fakes.server import (
    EchoEngine,
    MemoryStore,
    Refusal,
    Running,
    eventually,
    make_backend,
    refused,
    running_server,
)

BASE = make_base()
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files of a LoRA for ``BASE``."""
    directory = make_lora(tmp_path / "source", BASE)
    return {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@contextmanager
def opened(directory: Path, **settings: Any) -> Iterator[AdapterStore]:
    store = open_store(directory, BASE, **settings)
    try:
        yield store
    finally:
        store.close()


def header(files: Mapping[str, bytes], task_id: str = "hats", **fields: Any) -> pb.UploadAdapterRequest:
    infos = [
        pb.FileInfo(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    return pb.UploadAdapterRequest(header=pb.UploadHeader(task_id=task_id, files=infos, **fields))


def chunks(files: Mapping[str, bytes], size: int = 10_000) -> list[pb.UploadAdapterRequest]:
    return [
        pb.UploadAdapterRequest(
            chunk=pb.FileChunk(file_index=index, offset=offset, data=data[offset : offset + size])
        )
        for index, data in enumerate(files.values())
        for offset in range(0, len(data), size)
    ]


async def sent(messages: Iterable[pb.UploadAdapterRequest]) -> AsyncIterator[pb.UploadAdapterRequest]:
    for message in messages:
        yield message


async def upload(server: Running, messages: Iterable[pb.UploadAdapterRequest]) -> pb.UploadAdapterResponse:
    return await server.adapters.UploadAdapter(sent(messages))


async def refused_upload(server: Running, messages: Iterable[pb.UploadAdapterRequest]) -> Refusal:
    return await refused(server.adapters.UploadAdapter(sent(messages)))


def left_in(directory: Path) -> list[Path]:
    """Files of artifacts and of uploads under way."""
    return [
        path
        for part in ("artifacts", "scratch")
        for path in (directory / part).rglob("*.*")
        if path.is_file()
    ]


def registrations(server: Running) -> dict[tuple[str, str], float]:
    """Result and reason → how many, without those that never came."""
    name, registry = "manyhats_adapter_registrations_total", server.metrics.registry
    return {
        (sample.labels["result"], sample.labels["reason"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == name
    }


# On a real store.


async def test_uploaded_adapter_is_the_one_that_a_path_would_be(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with opened(tmp_path / "store", allowed_roots=[tmp_path]) as store:
        async with running_server(store=store) as server:
            answer = await upload(server, [header(files, labels={"team": "x"}), *chunks(files)])
            request = pb.RegisterAdapterRequest(task_id="other", uri=str(tmp_path / "source"))
            registered = await server.adapters.RegisterAdapter(request)
            assert registrations(server) == {("created", ""): 2.0}
    assert answer.created
    assert answer.adapter.digest == registered.adapter.digest
    assert (answer.adapter.state, answer.adapter.effect) == (pb.ADAPTER_STATE_ACTIVE, 0.25)
    assert answer.adapter.residency == pb.ADAPTER_RESIDENCY_DEVICE
    assert dict(answer.adapter.labels) == {"team": "x"}


async def test_chunks_may_come_in_any_order(tmp_path: Path, files: dict[str, bytes]) -> None:
    with opened(tmp_path / "store") as store:
        async with running_server(store=store) as server:
            pieces = chunks(files, size=1000)
            answer = await upload(server, [header(files), *pieces[::2], *reversed(pieces[1::2])])
    assert answer.created


async def test_upload_again_whole_is_the_version_that_exists(tmp_path: Path, files: dict[str, bytes]) -> None:
    with opened(tmp_path / "store") as store:
        async with running_server(store=store) as server:
            messages = [header(files, request_id="r1"), *chunks(files)]
            first = await upload(server, messages)
            again = await upload(server, messages)
            other = await refused_upload(server, [header(files, "caps", request_id="r1"), *chunks(files)])
    assert (again.created, again.adapter.version) == (first.created, 1)
    assert (other.code, other.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


def wrong_digest(files: dict[str, bytes]) -> list[pb.UploadAdapterRequest]:
    damaged = {**files, WEIGHTS: bytes([files[WEIGHTS][0] ^ 1]) + files[WEIGHTS][1:]}
    return [header(files), *chunks(damaged)]


def beyond_the_end(files: dict[str, bytes]) -> list[pb.UploadAdapterRequest]:
    return [header(files), *chunks({**files, WEIGHTS: files[WEIGHTS] + b"x"})]


def another_config(files: dict[str, bytes]) -> list[pb.UploadAdapterRequest]:
    changed = {**files, CONFIG: files[CONFIG].replace(b"LORA", b"LOHA")}
    return [header(changed), *chunks(changed)]


REFUSED: Mapping[str, tuple[Any, str, str]] = {
    "without its last chunk": (lambda f: [header(f), *chunks(f)[:-1]], "FIELD_INVALID", "is incomplete"),
    "without any chunk": (lambda f: [header(f)], "FIELD_INVALID", "is incomplete"),
    "with other bytes than announced": (wrong_digest, "DIGEST_MISMATCH", WEIGHTS),
    "longer than announced": (beyond_the_end, "FIELD_INVALID", "are outside"),
    "with a chunk twice": (lambda f: [header(f), *chunks(f), chunks(f)[-1]], "FIELD_INVALID", "overlap"),
    "with another expected digest": (
        lambda f: [header(f, expected_digest="sha256:" + "0" * 64), *chunks(f)],
        "DIGEST_MISMATCH",
        "expected_digest",
    ),
    "of a method that is not served": (another_config, "ADAPTER_UNSUPPORTED", "LOHA"),
    "with a pickle": (
        lambda f: [header({CONFIG: f[CONFIG], "adapter_model.bin": b"x"})],
        "ADAPTER_UNSAFE",
        "adapter_model.bin",
    ),
    "with a path for a name": (
        lambda f: [header({**f, f"../{CONFIG}": b"x"})],
        "FIELD_INVALID",
        "files[2].name",
    ),
    "without weights": (lambda f: [header({CONFIG: f[CONFIG]})], "ADAPTER_INVALID", "is missing"),
    "of a task with no proper name": (lambda f: [header(f, "../x")], "FIELD_INVALID", "task_id"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_refused_upload_leaves_nothing(tmp_path: Path, files: dict[str, bytes], case: str) -> None:
    make, reason, text = REFUSED[case]
    with opened(tmp_path / "store") as store:
        async with running_server(store=store) as server:
            refusal = await refused_upload(server, make(files))
            assert store.list().records == ()
            assert registrations(server) == {("refused", reason): 1.0}
            assert server.engine.resident == {}
        await eventually(lambda: left_in(tmp_path / "store") == [])
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason == reason
    assert text in refusal.message


async def test_oversized_upload_is_refused_before_a_byte_is_sent(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    limits = AdapterLimits(max_size_bytes=len(files[WEIGHTS]))
    with opened(tmp_path / "store", limits=limits) as store:
        async with running_server(store=store) as server:
            # A caller that waits for the header to be taken, and so would send nothing.
            refusal = await refused_upload(server, [header(files)])
    assert refusal.reason == "ADAPTER_TOO_LARGE"
    assert str(limits.max_size_bytes) in refusal.message


async def test_upload_over_a_quota_is_refused_before_a_byte_is_sent(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with opened(tmp_path / "store", quotas=Quotas(max_tasks=1)) as store:
        async with running_server(store=store) as server:
            await upload(server, [header(files), *chunks(files)])
            refusal = await refused_upload(server, [header(files, "caps")])
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert "max_tasks" in refusal.message


async def test_more_uploads_at_a_time_than_allowed_are_told_when_to_come_again(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with opened(tmp_path / "store", quotas=Quotas(max_transfers=2)) as store:
        async with running_server(store=store) as server:
            calls = [server.adapters.UploadAdapter() for _ in range(2)]
            for call in calls:
                await call.write(header(files))
                assert ("manyhats-upload", "accepted") in tuple(await call.initial_metadata())
            refusal = await refused_upload(server, [header(files)])
            assert (refusal.reason, refusal.retry_s) == ("QUOTA_EXCEEDED", 1.0)
            for call in calls:
                call.cancel()
            await eventually(lambda: left_in(tmp_path / "store") == [])
            assert (await upload(server, [header(files), *chunks(files)])).created


async def test_abandoned_upload_leaves_nothing(tmp_path: Path, files: dict[str, bytes]) -> None:
    with opened(tmp_path / "store") as store:
        async with running_server(store=store) as server:
            call = server.adapters.UploadAdapter()
            for message in [header(files), *chunks(files)[:-1]]:
                await call.write(message)
            await eventually(lambda: len(left_in(tmp_path / "store")) == 2)
            call.cancel()
            await eventually(lambda: left_in(tmp_path / "store") == [])
            assert store.list().records == ()
            await eventually(lambda: server.gate.num_running == 0)
            ((result, _),) = registrations(server)
            assert result in ("abandoned", "refused")  # gRPC may tell a server of the end of a stream first


async def test_vanished_client_leaves_nothing(tmp_path: Path, files: dict[str, bytes]) -> None:
    with opened(tmp_path / "store") as store:
        async with running_server(store=store) as server:
            channel = grpc.aio.insecure_channel(server.port.address)
            call = AdapterServiceStub(channel).UploadAdapter()
            await call.write(header(files))
            await eventually(lambda: len(left_in(tmp_path / "store")) == 2)
            await channel.close()
            await eventually(lambda: left_in(tmp_path / "store") == [])
            assert store.list().records == ()


async def test_validate_only_checks_the_bytes_and_stores_nothing(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with opened(tmp_path / "store") as store:
        async with running_server(store=store) as server:
            answer = await upload(server, [header(files, validate_only=True), *chunks(files)])
            assert store.list().records == ()
            assert registrations(server) == {("validated", ""): 1.0}
        assert left_in(tmp_path / "store") == []
    assert (answer.created, answer.adapter.version, answer.adapter.effect) == (False, 0, 0.25)


# On a store in memory.


async def test_first_message_must_be_the_header_and_the_others_chunks() -> None:
    files = {CONFIG: b"{}", WEIGHTS: b"x"}
    async with running_server() as server:
        for messages, field in (
            ([], "header"),
            ([pb.UploadAdapterRequest()], "header"),
            (chunks(files), "header"),
            ([header(files), header(files)], "chunk"),
            ([header(files), pb.UploadAdapterRequest()], "chunk"),
        ):
            refusal = await refused_upload(server, messages)
            assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))
        assert all(each.is_aborted for each in server.store.uploads)
        assert server.store.tasks == {}


async def test_sender_is_slowed_down_to_the_pace_of_the_disk() -> None:
    # In chunks of a MiB: far more of them than gRPC and the sockets keep on either side, which has been 26.
    files = {WEIGHTS: bytes(1024 * 1024) * 128}
    store, taken = MemoryStore(), 0

    async def counted() -> AsyncIterator[pb.UploadAdapterRequest]:
        nonlocal taken
        for message in [header(files), *chunks(files, 1024 * 1024)]:
            yield message
            taken += 1

    async with running_server(store=store) as server:
        store.may_write.clear()
        call = asyncio.ensure_future(_awaited(server.adapters.UploadAdapter(counted())))
        await eventually(lambda: taken > 1)
        before = -1
        while before != taken:  # until no more is taken
            before = taken
            await asyncio.sleep(0.2)
        assert taken < 96
        store.may_write.set()
        await call
    (upload,) = store.uploads
    assert b"".join(data for _, _, data in upload.pieces) == files[WEIGHTS]


async def _awaited(call: Any) -> Any:
    return await call


async def test_upload_that_is_cancelled_while_it_is_opened_is_aborted() -> None:
    store = MemoryStore()
    async with running_server(store=store) as server:
        store.may_open.clear()
        call = server.adapters.UploadAdapter()
        await call.write(header({CONFIG: b"{}"}))
        await eventually(lambda: server.gate.num_running == 1)
        call.cancel()
        await asyncio.sleep(0.05)
        store.may_open.set()
        await eventually(lambda: [each.is_aborted for each in store.uploads] == [True])


async def test_upload_that_stalls_is_given_up() -> None:
    async def stalling() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield header({CONFIG: b"{}"})
        await asyncio.Event().wait()

    async def accept() -> None:
        pass

    store, metrics = MemoryStore(), Metrics(max_task_labels=1)
    registrations = Registrations(make_backend(EchoEngine(), store), metrics)
    with pytest.raises(UploadStalledError):
        await take_upload(UploadMessages(stalling()), registrations, accept, stall_limit_s=0.05)
    assert [each.is_aborted for each in store.uploads] == [True]
    labels = {"result": "refused", "reason": "UPLOAD_STALLED"}
    assert metrics.registry.get_sample_value("manyhats_adapter_registrations_total", labels) == 1
