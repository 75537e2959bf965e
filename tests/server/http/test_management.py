"""Managing tasks over HTTP: the same answers as gRPC's, in protobuf's JSON, and the same refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterMethod, AdapterState
from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.heads import Pooling, TaskKind
from manyhats.adapters.store.opening import open_store
from manyhats.engine.residency.tiers import Tier
from manyhats.server.access.tokens import Role
from manyhats.server.grpc import to_proto
from manyhats.server.http.adapter_messages import adapter_body
from manyhats.server.http.body import MAX_BODY_BYTES
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import server_pb2
from support.factories.adapters import make_base, make_lora
from support.fakes.server import MemoryStore, Running, eventually, make_record, running_server
from support.servers.secure import add_token, secured_server

BASE = make_base()


@asynccontextmanager
async def client_of(server: Running, token: str = "") -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    async with httpx2.AsyncClient(base_url=f"http://{server.http}", headers=headers) as client:
        yield client


def json_of(message: Message) -> Any:
    return MessageToDict(message, always_print_fields_with_no_presence=True)


async def registered(server: Running, *names: str) -> None:
    for name in names:
        task_id, _, uri = name.partition("=")
        await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(task_id=task_id, uri=uri))


# The same answers as gRPC's.


async def test_every_method_answers_as_over_grpc() -> None:
    async with running_server() as server, client_of(server) as client:
        await registered(server, "hats=a", "hats=b", "caps=c")
        one = await server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="hats"))
        assert (await client.get("/v1/tasks/hats")).json() == json_of(one)
        old = await server.adapters.GetAdapter(pb.GetAdapterRequest(task_id="hats@1"))
        assert (await client.get("/v1/tasks/hats@1")).json() == json_of(old)
        assert (await client.get("/v1/tasks/hats%401")).json() == json_of(old)
        every = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert (await client.get("/v1/tasks")).json() == json_of(every)
        page = await server.adapters.ListAdapters(pb.ListAdaptersRequest(task_id="hats", page_size=1))
        query = {"taskId": "hats", "pageSize": "1"}
        assert (await client.get("/v1/tasks", params=query)).json() == json_of(page)
        rest = await client.get("/v1/tasks", params={**query, "pageToken": page.next_page_token})
        assert [each["version"] for each in rest.json()["adapters"]] == [2]
        activated = await client.post("/v1/tasks/hats@1/activate")
        again = await server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        assert activated.json() == json_of(again)
        pinned = await client.post("/v1/tasks/hats/pin")
        assert pinned.json()["adapter"]["pinned"] is True
        again_pinned = await server.adapters.PinAdapter(pb.PinAdapterRequest(task_id="hats"))
        assert pinned.json() == json_of(again_pinned)
        unpinned = await client.post("/v1/tasks/hats/unpin")
        assert unpinned.json() == json_of(
            await server.adapters.UnpinAdapter(pb.UnpinAdapterRequest(task_id="hats"))
        )
        gone = await client.delete("/v1/tasks/caps")
        assert [each["taskId"] for each in gone.json()["adapters"]] == ["caps"]
        assert set(server.store.tasks) == {"hats"}


async def test_a_caller_of_a_server_without_tokens_may_do_everything() -> None:
    async with running_server() as server, client_of(server) as client:
        caller = (await client.get("/v1/caller")).json()
        assert caller == {"name": "", "roles": ["generate", "manage"], "tasks": None}


async def test_the_server_is_described_as_over_grpc() -> None:
    async with running_server() as server, client_of(server) as client:
        info = await server.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        info.limits.max_request_bytes = MAX_BODY_BYTES  # a port's own
        assert (await client.get("/v1/server")).json() == json_of(info)


@pytest.mark.parametrize(
    "request_message",
    [
        pb.RegisterAdapterRequest(task_id="hats", uri="a"),
        pb.RegisterAdapterRequest(
            task_id="hats", uri="a", activate=False, labels={"team": "x"}, request_id="r"
        ),
        pb.RegisterAdapterRequest(task_id="hats", uri="a", validate_only=True, assume_base=True),
        pb.RegisterAdapterRequest(
            task_id="hats", parts=[pb.AdapterPart(uri="a", weight=0.5), pb.AdapterPart(uri="b")]
        ),
    ],
)
async def test_a_registration_is_grpcs_message_as_json(request_message: pb.RegisterAdapterRequest) -> None:
    async with running_server() as server:
        expected = await server.adapters.RegisterAdapter(request_message)
    async with running_server() as server, client_of(server) as client:
        for options in ({}, {"always_print_fields_with_no_presence": True}):
            server.store.tasks.clear()
            answer = await client.post("/v1/tasks", json=MessageToDict(request_message, **options))
            assert answer.json() == json_of(expected)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
records = st.builds(
    replace,
    st.builds(make_record, st.just("hats"), st.integers(0, 2**32 - 1)),
    method=st.sampled_from(AdapterMethod),
    state=st.sampled_from(AdapterState),
    kind=st.sampled_from(TaskKind),
    num_classes=st.integers(0, 3),
    pooling=st.none() | st.sampled_from(Pooling),
    state_reason=words,
    size_bytes=st.integers(0, 2**64 - 1),
    num_parameters=st.integers(0, 2**64 - 1),
    source=words,
    base_model=words,
    labels=st.dictionaries(words, words, max_size=3),
    effect=st.none() | st.floats(0, 1e6),
    notes=st.lists(words, max_size=2).map(tuple),
    create_time=st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC)).flatmap(
        lambda time: st.sampled_from([time, time.replace(microsecond=0), time.replace(microsecond=5000)])
    ),
)


@given(records, st.sampled_from([None, *Tier]))
def test_any_record_is_protobufs_json(record: Any, tier: Tier | None) -> None:
    body = adapter_body(record, {} if tier is None else {record.digest: tier})
    assert json.loads(msgspec.json.encode(body)) == json_of(to_proto.adapter(record, tier))


# Uploads.


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of a LoRA for ``BASE``, as parts of a form."""
    directory = make_lora(tmp_path / "source", BASE)
    return [("file", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    store = open_store(tmp_path / "store", BASE, [tmp_path])
    yield store
    store.close()


async def test_an_upload_is_what_a_registration_of_the_directory_is(
    tmp_path: Path, files: Any, store: Any
) -> None:
    async with running_server(store=store) as server, client_of(server) as client:
        options = {"labels": {"team": "x"}, "activate": False}
        answer = await client.put("/v1/tasks/hats/upload", data={"options": json.dumps(options)}, files=files)
        same = await client.post("/v1/tasks", json={"taskId": "caps", "uri": str(tmp_path / "source")})
    assert (answer.status_code, answer.json()["created"]) == (200, True)
    adapter = answer.json()["adapter"]
    assert adapter["digest"] == same.json()["adapter"]["digest"]
    assert (adapter["source"], adapter["labels"], adapter["state"]) == (
        "upload",
        {"team": "x"},
        "ADAPTER_STATE_INACTIVE",
    )


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
async def test_an_upload_may_come_in_any_pieces(files: Any, store: Any, piece_bytes: int) -> None:
    request = httpx2.Request(
        "PUT", "http://x", files=[(name, (each[0], each[1][:2000])) for name, each in files]
    )
    whole = request.read()
    config, weights = (each for _, each in files)

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(whole), piece_bytes):
            yield whole[begin : begin + piece_bytes]

    memory = MemoryStore()
    async with running_server(store=memory) as server, client_of(server) as client:
        head = {"content-type": request.headers["content-type"]}
        answer = await client.put("/v1/tasks/hats/upload", content=pieces(), headers=head)
    assert answer.status_code == 200
    (upload,) = memory.uploads
    assert upload.names == [config[0], weights[0]]
    for index, (_, data) in enumerate([config, weights]):
        arrived = sorted((offset, piece) for number, offset, piece in upload.pieces if number == index)
        assert b"".join(piece for _, piece in arrived) == data[:2000]


FORM = {"content-type": "multipart/form-data; boundary=x"}


def part(disposition: str, value: str) -> str:
    return f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{value}\r\n"


CONFIG = part('name="file"; filename="adapter_config.json"', "{}")


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ("", "body"),
        ("--x--\r\n", "file"),
        ("nonsense", "body"),
        (CONFIG, "body"),
        (part('name="options"', "{") + CONFIG + "--x--\r\n", "body"),
        (part('name="options"', '{"nonsense": 1}') + CONFIG + "--x--\r\n", "nonsense"),
        (part('name="options"', '{"labels": {"": "x"}}') + CONFIG + "--x--\r\n", "labels"),
        (part('name="options"', "x" * 300_000), "options"),
        (part('name="options"', "{}") + "--x--\r\n", "file"),
        (part('name="task"', "x") + CONFIG + "--x--\r\n", "task"),
        (CONFIG + part('name="options"', "{}") + "--x--\r\n", "options"),
        ("--x\r\nNo-Disposition: 1\r\n\r\n{}\r\n--x--\r\n", ""),
    ],
)
async def test_a_bad_form_is_refused_by_name(form: str, param: str) -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.put("/v1/tasks/hats/upload", content=form, headers=FORM)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert all(upload.is_aborted for upload in server.store.uploads)
        assert server.store.tasks == {}


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 300],
)
async def test_another_format_is_refused(content_type: str) -> None:
    async with running_server() as server, client_of(server) as client:
        head = {"content-type": content_type}
        answer = await client.put("/v1/tasks/hats/upload", content="{}", headers=head)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_an_upload_whose_caller_leaves_leaves_nothing() -> None:
    async with running_server() as server:
        host, _, port = server.http.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = "PUT /v1/tasks/hats/upload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999\r\n"
        writer.write(f"{head}content-type: {FORM['content-type']}\r\n\r\n{CONFIG[:-4]}".encode())
        await eventually(
            lambda: [upload.names for upload in server.store.uploads] == [["adapter_config.json"]]
        )
        assert server.gate.num_running == 1
        writer.close()
        await eventually(lambda: server.gate.num_running == 0)
        await eventually(lambda: server.store.uploads[0].is_aborted)


async def test_a_slow_disk_slows_the_caller_down() -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        yield CONFIG.removesuffix("{}\r\n").encode()
        for _ in range(400):
            sent += 1
            yield bytes(100_000)
        yield b"\r\n--x--\r\n"

    async with running_server() as server, client_of(server) as client:
        server.store.may_write.clear()
        uploading = asyncio.ensure_future(
            client.put("/v1/tasks/hats/upload", content=pieces(), headers=FORM, timeout=30)
        )
        await eventually(lambda: bool(server.store.uploads))
        await asyncio.sleep(0.3)
        waiting = sent
        server.store.may_write.set()
        assert (await uploading).status_code == 200
        # What the sockets of both ends hold, a few MB, and one piece.
        assert waiting < 200
        assert max(len(data) for _, _, data in server.store.uploads[0].pieces) <= 256 * 1024


# Refusals.


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/v1/tasks/other", None, 404, "taskId"),
        ("GET", "/v1/tasks/NO", None, 400, "taskId"),
        ("GET", "/v1/tasks?pageSize=x", None, 400, "pageSize"),
        ("GET", "/v1/tasks?page_size=5", None, 400, "page_size"),
        ("GET", "/v1/tasks?pageToken=x", None, 400, "pageToken"),
        ("GET", "/v1/tasks?" + "&".join("ab=1" for _ in range(30)), None, 400, "query"),
        ("DELETE", "/v1/tasks/hats?force=perhaps", None, 400, "force"),
        ("DELETE", "/v1/tasks/other", None, 404, "taskId"),
        ("POST", "/v1/tasks/hats/activate", None, 400, "taskId"),
        ("POST", "/v1/tasks/hats@9/activate", None, 404, "taskId"),
        ("POST", "/v1/tasks", {"taskId": "caps"}, 400, "uri"),
        ("POST", "/v1/tasks", {"taskId": "caps", "uri": "a", "parts": [{"uri": "b"}]}, 400, "uri"),
        ("POST", "/v1/tasks", {"taskId": "caps", "parts": [{"uri": ""}]}, 400, "parts[0].uri"),
        ("POST", "/v1/tasks", {"taskId": "caps", "uri": 1}, 400, "uri"),
        ("POST", "/v1/tasks", {"task_id": "caps", "uri": "a"}, 400, "task_id"),
        ("POST", "/v1/tasks", {"uri": "a"}, 400, "taskId"),
        ("POST", "/v1/tasks", {"taskId": "caps", "uri": "a", "requestId": "x" * 200}, 400, "requestId"),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "hats", "lora_path": "b"}, 400, "lora_name"),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "caps", "lora_path": ""}, 400, "lora_path"),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "b"}, 400, "lora_name"),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "other"}, 404, "lora_name"),
    ],
)
async def test_a_bad_call_names_the_field_as_its_caller_does(
    method: str, path: str, body: Any, status: int, param: str
) -> None:
    async with running_server() as server, client_of(server) as client:
        await registered(server, "hats=a")
        answer = await client.request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        assert list(server.store.tasks) == ["hats"]


async def test_another_method_is_told_which_there_are() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.patch("/v1/tasks/hats")
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


async def test_a_version_in_use_is_deleted_by_force_alone() -> None:
    async with running_server() as server, client_of(server) as client:
        await registered(server, "hats=a")
        server.engine.used.add("hats@1")
        answer = await client.delete("/v1/tasks/hats")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_in_use")
        assert (await client.delete("/v1/tasks/hats?force=true")).status_code == 200
        assert server.store.tasks == {}


async def test_a_refused_registration_is_counted_once_by_reason() -> None:
    async with running_server() as server, client_of(server) as client:
        server.store.errors["bad"] = AdapterInvalidError("adapter_config.json", "is no JSON")
        answer = await client.post("/v1/tasks", json={"taskId": "hats", "uri": "bad"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_invalid")
        count = server.metrics.registry.get_sample_value(
            "manyhats_adapter_registrations_total", {"result": "refused", "reason": "ADAPTER_INVALID"}
        )
        assert count == 1.0


async def test_vllms_routes_load_and_unload_by_name() -> None:
    async with running_server() as server, client_of(server) as client:
        body = {"lora_name": "hats", "lora_path": "a"}
        first = await client.post("/v1/load_lora_adapter", json=body)
        assert (first.status_code, "success" in first.text) == (200, True)
        assert first.headers["content-type"].startswith("text/plain")
        again = {**body, "lora_path": "b", "load_inplace": True}
        assert (await client.post("/v1/load_lora_adapter", json=again)).status_code == 200
        assert [record.version for record in server.store.tasks["hats"]] == [1, 2]
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "hats", "lora_int_id": 1})
        assert (gone.status_code, "success" in gone.text) == (200, True)
        assert server.store.tasks == {}


async def test_roles_and_scopes_hold_as_over_grpc(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    reader = add_token(file, "reader", (Role.GENERATE,), ("hats",))
    manager = add_token(file, "manager", (Role.MANAGE,), ("hats",))
    async with secured_server(token_file=file) as server:
        server.store.tasks.update({"hats": [make_record("hats")], "caps": [make_record("caps")]})
        calls = [
            ("GET", "/v1/tasks/hats", 200, 200),
            ("GET", "/v1/tasks/caps", 403, 403),
            ("GET", "/v1/server", 200, 200),
            ("POST", "/v1/tasks/hats@1/activate", 403, 200),
            ("POST", "/v1/tasks/caps@1/activate", 403, 403),
            ("PUT", "/v1/tasks/hats/upload", 403, 415),
            ("PUT", "/v1/tasks/caps/upload", 403, 403),
            ("DELETE", "/v1/tasks/caps", 403, 403),
            ("DELETE", "/v1/tasks/hats", 403, 200),
        ]
        async with client_of(server) as nobody:
            assert (await nobody.get("/v1/tasks")).status_code == 401
        async with client_of(server, reader) as reading, client_of(server, manager) as managing:
            caller = (await reading.get("/v1/caller")).json()
            assert caller == {"name": "reader", "roles": ["generate"], "tasks": ["hats"]}
            listed = (await reading.get("/v1/tasks")).json()["adapters"]
            assert [each["taskId"] for each in listed] == ["hats"]
            for method, path, as_reader, as_manager in calls:
                assert (await reading.request(method, path)).status_code == as_reader, path
                assert (await managing.request(method, path)).status_code == as_manager, path
