"""Bytes that are no message, and more calls than can be answered: each has its status, and is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyhats.server.grpc.messages import Unreadable, tolerant
from manyhats.v1 import adapter_pb2, generation_pb2, server_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, eventually, refusal_of, refused, running_server

METHODS = [
    (service.full_name, method.name, method.client_streaming, method.server_streaming, method.input_type)
    for file in (generation_pb2, adapter_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
OTHERS = [
    ("grpc.health.v1.Health", "Check", False, False),
    ("grpc.health.v1.Health", "Watch", False, True),
    ("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo", True, True),
]
BAD = {
    "no field": b"\xff\xff",
    "cut off": b"\x0a\x05ab",
    "group without an end": b"\x0b",
    "wire type that is none": b"\x0f\x00",
    "varint without an end": b"\x08" + b"\xff" * 11,
    "text that is not UTF-8": b"\x0a\x02\xff\xfe",
}


async def send(
    server: Running, service: str, method: str, streams: tuple[bool, bool], *bytes_: bytes
) -> None:
    """Makes a call of raw bytes and takes all that comes."""

    async def messages() -> AsyncIterator[bytes]:
        for each in bytes_:
            yield each

    kinds = {
        (False, False): server.channel.unary_unary,
        (False, True): server.channel.unary_stream,
        (True, False): server.channel.stream_unary,
        (True, True): server.channel.stream_stream,
    }
    make: Any = kinds[streams](
        f"/{service}/{method}", request_serializer=bytes, response_deserializer=lambda data: data
    )
    call = make(messages() if streams[0] else bytes_[0])
    if streams[1]:
        async for _ in call:
            pass
    else:
        await call


def counted(server: Running, method: str, code: str) -> float:
    """Calls of a method that ended so, whether or not their message was read."""
    labels = [{"task": task, "method": method, "code": code} for task in ("", "_base")]
    registry = server.metrics.registry
    return sum(registry.get_sample_value("manyhats_requests_total", each) or 0.0 for each in labels)


@pytest.mark.parametrize("bad", BAD)
async def test_bytes_that_are_no_message_are_an_invalid_argument_and_counted(bad: str) -> None:
    async with running_server() as server:
        for service, method, client_streams, server_streams, message in METHODS:
            try:
                message._concrete_class.FromString(BAD[bad])
                continue  # nothing is wrong with them here: the field's number is none of this message's
            except DecodeError:
                pass
            streams = (client_streams, server_streams)
            refusal = await refused(send(server, service, method, streams, BAD[bad]))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"), (
                method
            )
            assert refusal.fields == ("request",)
            assert refusal.message == f"request: its bytes are not a {message.full_name} message"
            assert counted(server, method, "INVALID_ARGUMENT") == 1.0
        assert server.gate.num_running == 0
        await server.generation.Generate(pb.GenerateRequest(text="on"))


async def test_every_method_is_covered_by_some_bytes() -> None:
    for *_, message in METHODS:
        with pytest.raises(DecodeError):
            message._concrete_class.FromString(BAD["no field"])
    assert len(METHODS) >= 11


@pytest.mark.parametrize(("service", "method", "client_streams", "server_streams"), OTHERS)
async def test_health_and_reflection_refuse_bytes_that_are_no_message(
    service: str, method: str, client_streams: bool, server_streams: bool
) -> None:
    async with running_server() as server:
        streams = (client_streams, server_streams)
        refusal = await refused(send(server, service, method, streams, BAD["no field"]))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")


async def test_bytes_that_are_no_message_in_the_middle_of_an_upload_end_it() -> None:
    header = adapter_pb2.UploadAdapterRequest(header=adapter_pb2.UploadHeader(task_id="hats"))
    async with running_server() as server:
        messages = (header.SerializeToString(), BAD["no field"])
        upload = ("manyhats.v1.AdapterService", "UploadAdapter", (True, False))
        refusal = await refused(send(server, *upload, *messages))
        await eventually(lambda: server.store.uploads[0].is_aborted)
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("request",))


def empty_parts(*numbers: int, count: int) -> bytes:
    """Empty parts of the field that ``numbers`` lead to, in wire format."""
    *outer, inner = numbers
    data = bytes([inner << 3 | 2, 0]) * count
    for number in reversed(outer):
        data = bytes([number << 3 | 2]) + _varint(len(data)) + data
    return data


def _varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def number_of(message: Any, name: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[name].number)


CHAT = number_of(pb.GenerateRequest, "chat"), number_of(pb.ChatMessages, "messages")
STOP = number_of(pb.GenerateRequest, "stopping"), number_of(pb.StoppingParams, "stop_sequences")
FILES = (
    number_of(adapter_pb2.UploadAdapterRequest, "header"),
    number_of(adapter_pb2.UploadHeader, "files"),
)
GENERATE = ("manyhats.v1.GenerationService", "Generate", (False, False))


@pytest.mark.parametrize("numbers", [CHAT, STOP, (15,)], ids=["messages", "texts", "an unknown field"])
async def test_a_message_of_countless_parts_is_refused_unread(numbers: tuple[int, ...]) -> None:
    async with running_server() as server:
        refusal = await refused(send(server, *GENERATE, empty_parts(*numbers, count=1_000_000)))
        few = await refused(send(server, *GENERATE, empty_parts(*numbers, count=32_000)))
        upload = ("manyhats.v1.AdapterService", "UploadAdapter", (True, False))
        in_stream = await refused(send(server, *upload, empty_parts(*FILES, count=1_000_000)))
    assert refusal.message == "request: has more than 32768 fields, including nested ones"
    assert (in_stream.message, in_stream.fields) == (refusal.message, ("request",))
    assert "fields" not in few.message


_CHAT = bytes([CHAT[0] << 3 | 2])
_GROUP, _END = _varint(100 << 3 | 3), _varint(100 << 3 | 4)  # of a field that no message has
BROKEN = {
    "a number of too many bits": _CHAT + b"\x0c" + b"\xff" * 12,
    "a number that goes on behind its part": _CHAT + b"\x01\x80",
    "a part that ends behind the message": _CHAT + b"\x7f",
    "a type that is none": _CHAT + b"\x01\x0f",
    "text that is not all there": _CHAT + b"\x02\x0a\x7f",
}
HIDDEN = {name: _GROUP + data + _END for name, data in BROKEN.items() if "behind the message" not in name}


@pytest.mark.parametrize("last", [*BROKEN.values(), *HIDDEN.values()])
async def test_one_broken_part_does_not_hide_countless_others(last: bytes) -> None:
    async with running_server() as server:
        million = empty_parts(*CHAT, count=900_000)
        behind = await refused(send(server, *GENERATE, million + last))
        within = await refused(send(server, *GENERATE, empty_parts(*CHAT, count=32_000) + last + million))
    assert behind.message == "request: has more than 32768 fields, including nested ones"
    assert within.fields == ("request",)


@pytest.mark.parametrize(
    ("method", "limit"), [("Generate", 2 * 2**20), ("Tokenize", 2 * 2**20), ("Score", 4 * 2**20)]
)
async def test_a_message_over_its_limit_is_refused_with_its_size(method: str, limit: int) -> None:
    call = ("manyhats.v1.GenerationService", method, (False, False))
    async with running_server() as server:
        refusal = await refused(send(server, *call, b"\xff" * (limit + 1)))
        assert counted(server, method, "INVALID_ARGUMENT") == 1.0
    assert refusal.message == f"request: has {limit + 1} bytes; the limit is {limit}"


async def test_the_largest_requests_are_read() -> None:
    """Chats and scorings with as many parts as may be, and texts as long."""
    turns = [pb.ChatMessage(role="user", content="x" * 100) for _ in range(1024)]
    texts = [pb.Continuation(text="y" * 100) for _ in range(1024)]
    async with running_server() as server:
        server.engine.max_context_length = 10**7
        last = pb.StoppingParams(max_new_tokens=1)
        chat = pb.GenerateRequest(
            chat=pb.ChatMessages(messages=turns),
            stopping=last,
            sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)),
        )
        await server.generation.Generate(chat)
        await server.generation.Generate(pb.GenerateRequest(text="x" * 2**20, stopping=last))
        answer = await server.generation.Score(pb.ScoreRequest(text="x" * 2**17, continuations=texts))
    assert len(answer.scores) == 1024


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), repeats=st.integers(400, 700))
def test_long_bytes_that_are_anything_are_read_as_the_library_reads_them_or_refused(
    data: bytes, repeats: int
) -> None:
    read = tolerant(pb.GenerateRequest.FromString)
    assert read is not None
    found = read(data * repeats)
    try:
        theirs: object = pb.GenerateRequest.FromString(data * repeats)
    except DecodeError:
        theirs = None
    if theirs is None:
        assert isinstance(found, Unreadable)
    elif isinstance(found, Unreadable):
        assert "fields" in found.reason
    else:
        assert found == theirs


async def test_unknown_methods_stay_unimplemented_and_large_messages_say_the_limit() -> None:
    async with running_server() as server:
        generation = "manyhats.v1.GenerationService"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await send(server, generation, "Degenerate", (False, False), b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as large:
            await send(server, generation, "Generate", (False, False), b"\xff" * (9 * 1024 * 1024))
    assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert large.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (large.value.details() or "")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40), which=st.integers(0, len(METHODS) - 1))
def test_any_bytes_have_a_status_that_says_why(data: bytes, which: int) -> None:
    service, method, client_streams, server_streams, _ = METHODS[which]

    async def run() -> None:
        async with running_server() as server:
            streams = (client_streams, server_streams)
            try:
                await send(server, service, method, streams, data)
            except grpc.aio.AioRpcError as error:
                refusal = refusal_of(error)
                assert refusal.reason
                assert refusal.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)

    asyncio.run(run())


async def test_more_calls_than_may_run_are_refused_with_a_time_to_come_back_and_counted() -> None:
    async with running_server(max_calls=10) as server:
        server.engine.step_s = 0.05
        calls = [server.generation.Generate(pb.GenerateRequest(text="hat")) for _ in range(200)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refusals = [refusal_of(each) for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert 10 <= len(answers) - len(refusals) < 200
        assert {(each.code, each.reason) for each in refusals} == {
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        }
        assert all(0.1 <= (each.retry_s or 0.0) <= 60 for each in refusals)
        assert refusals[0].info.metadata["limit"] == "10"
        assert counted(server, "Generate", "RESOURCE_EXHAUSTED") == len(refusals)
        assert server.gate.num_running == 0
        await server.generation.Generate(pb.GenerateRequest(text="on"))


@pytest.mark.parametrize("method", ["GenerateStream", "UploadAdapter", "GetServerInfo"])
async def test_every_kind_of_call_is_refused_while_the_server_is_full(method: str) -> None:
    kinds = {name: (service, name, (client, server)) for service, name, client, server, _ in METHODS}
    async with running_server(max_calls=1) as server:
        server.engine.step_s = 0.2
        running = asyncio.ensure_future(server.generation.Generate(pb.GenerateRequest(text="a")))
        await eventually(lambda: server.gate.num_running == 1)
        refusal = await refused(send(server, *kinds[method], b""))
        await running
        assert counted(server, method, "RESOURCE_EXHAUSTED") == 1.0
    assert (refusal.reason, refusal.retry_s) == ("QUEUE_FULL", 1.0)


async def test_thousands_of_calls_at_once_all_get_an_answer_or_a_status_that_says_why() -> None:
    async with running_server(max_calls=500) as server:
        calls = [server.generation.Generate(pb.GenerateRequest(text="hat")) for _ in range(3000)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refusals = [refusal_of(each) for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        num_answered = len(answers) - len(refusals)
        assert {each.reason for each in refusals} <= {"QUEUE_FULL"}
        assert num_answered >= 500
        labels = {"task": "_base", "method": "Generate", "code": "OK"}
        assert server.metrics.registry.get_sample_value("manyhats_requests_total", labels) == num_answered
        assert counted(server, "Generate", "RESOURCE_EXHAUSTED") == len(refusals)
