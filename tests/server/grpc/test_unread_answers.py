"""Answers of one message, unread or too large: inside the limits of calls, time and bytes, and never counted as OK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from manyhats.v1 import adapter_pb2, server_pb2
from manyhats.v1 import generation_pb2 as pb
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.fakes.server import (
    SMALL_WINDOW,
    ByteTokenizer,
    Running,
    eventually,
    refusal_of,
    refused,
    running_server,
)

MANY = 100_000
TOKENIZE = pb.TokenizeRequest(token_ids=pb.TokenIds(ids=[70] * MANY))
ANSWER_BYTES = 4 * MANY  # an id of one byte, a piece of three
SCORE = pb.ScoreRequest(text="a", continuations=[pb.Continuation(text="b" * 30)] * 1000)
LOGPROBS = pb.GenerateRequest(text="a" * 100_000, response=pb.ResponseOptions(prompt_logprobs=True))
LARGE = {"Tokenize": TOKENIZE, "Score": SCORE, "Generate": LOGPROBS}
Call = grpc.aio.UnaryStreamCall[Any, Any]


@asynccontextmanager
async def caller_that_does_not_read(server: Running) -> AsyncIterator[Callable[[str], Call]]:
    """Makes calls of one answer, each of which is read only where it is asked for."""
    server.engine.max_context_length = 10**6
    async with grpc.aio.insecure_channel(server.port.address, options=SMALL_WINDOW) as channel:
        yield lambda name: channel.unary_stream(f"/manyhats.v1.GenerationService/{name}")(
            LARGE[name].SerializeToString()
        )


def counted(server: Running, method: str, code: str) -> float:
    labels = {"task": "_base" if method != "Tokenize" else "", "method": method, "code": code}
    return server.metrics.registry.get_sample_value("manyhats_requests_total", labels) or 0.0


async def failure(call: Call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


@pytest.mark.parametrize("method", LARGE)
async def test_an_answer_nobody_reads_is_a_running_call_and_given_up_in_time(method: str) -> None:
    async with running_server(unread_limit_s=1.0) as server, caller_that_does_not_read(server) as make:
        call = make(method)
        await eventually(lambda: server.gate.num_running == 1)
        await asyncio.sleep(0.5)
        assert (server.gate.num_running, counted(server, method, "OK")) == (1, 0.0)
        await eventually(lambda: server.gate.num_running == 0)
        assert counted(server, method, "RESOURCE_EXHAUSTED") == 1.0
        refusal = refusal_of(await failure(call))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_UNREAD")
        assert counted(server, method, "OK") == 0.0


async def test_unread_answers_count_towards_the_limit_of_calls() -> None:
    async with running_server(max_calls=3) as server, caller_that_does_not_read(server) as make:
        calls = [make("Tokenize") for _ in range(3)]
        await eventually(lambda: server.gate.is_full)
        await asyncio.sleep(0.3)
        refusal = await refused(server.generation.Tokenize(pb.TokenizeRequest(text="a")))
        assert refusal.reason == "QUEUE_FULL"
        for call in calls:
            assert [len(answer) > ANSWER_BYTES async for answer in call] == [True]
        await server.generation.Tokenize(pb.TokenizeRequest(text="a"))
        assert counted(server, "Tokenize", "OK") == 4.0


async def test_unread_answers_count_towards_a_limit_of_bytes_and_small_ones_do_not() -> None:
    async with (
        running_server(max_answer_bytes=2 * ANSWER_BYTES) as server,
        caller_that_does_not_read(server) as make,
    ):
        unread = make("Tokenize")
        await eventually(lambda: server.gate.num_running == 1)
        await asyncio.sleep(0.3)
        refusal = await refused(server.generation.Tokenize(TOKENIZE))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (refusal.retry_s, refusal.info.metadata["limit"]) == (1.0, str(2 * ANSWER_BYTES))
        assert "is still unread" in refusal.message
        assert len((await server.generation.Tokenize(pb.TokenizeRequest(text="a" * 9999))).ids) == 10_000
        assert [len(answer) > ANSWER_BYTES async for answer in unread] == [True]
        assert len((await server.generation.Tokenize(TOKENIZE)).ids) == MANY


async def test_a_given_up_answer_counts_until_its_caller_reads_it_or_goes() -> None:
    async with (
        running_server(unread_limit_s=0.2, max_answer_bytes=2 * ANSWER_BYTES) as server,
        caller_that_does_not_read(server) as make,
    ):
        for end in ("read", "cancel"):
            unread = make("Tokenize")
            await eventually(lambda: server.gate.num_running == 1)
            await eventually(lambda: server.gate.num_running == 0)
            assert (await refused(server.generation.Tokenize(TOKENIZE))).reason == "QUEUE_FULL"
            if end == "read":
                await failure(unread)
            else:
                unread.cancel()
            await eventually_answered(server)


async def eventually_answered(server: Running) -> None:
    for _ in range(100):
        try:
            await server.generation.Tokenize(TOKENIZE)
            return
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.02)
    raise AssertionError("there is no room again")


async def test_a_caller_that_leaves_or_is_late_ends_its_unread_answer_at_once() -> None:
    async with running_server() as server, caller_that_does_not_read(server) as make:
        leaving = make("Tokenize")
        async with grpc.aio.insecure_channel(server.port.address, options=SMALL_WINDOW) as channel:
            method = channel.unary_stream("/manyhats.v1.GenerationService/Tokenize")
            late = method(TOKENIZE.SerializeToString(), timeout=1.0)
            await eventually(lambda: server.gate.num_running == 2)
            await asyncio.sleep(0.3)
            leaving.cancel()
            await eventually(lambda: server.gate.num_running == 0)
            assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert counted(server, "Tokenize", "OK") == 0.0
        assert counted(server, "Tokenize", "CANCELLED") == 1.0


@pytest.mark.parametrize("method", LARGE)
async def test_an_answer_of_more_bytes_than_it_may_have_is_refused_and_counted_so(method: str) -> None:
    async with running_server(max_answer_bytes=80_000) as server:
        server.engine.max_context_length = 10**6
        refusal = await refused(getattr(server.generation, method)(LARGE[method]))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
        assert refusal.fields == ("request",)
        assert "the limit is 80000" in refusal.message
        assert counted(server, method, "INVALID_ARGUMENT") == 1.0
        assert counted(server, method, "OK") == 0.0
        await server.generation.Generate(pb.GenerateRequest(text="on"))


class LongPieces(ByteTokenizer):
    """Each token's text is as long as a tokenizer may have it, in characters of four bytes."""

    def piece(self, token_id: int) -> str:
        return "\N{TOP HAT}" * 1024


IDS = pb.TokenIds(ids=[9] * 2049)
TOO_MUCH_TEXT = {
    "text": pb.TokenizeRequest(text="x" * 2049),
    "token_ids": pb.TokenizeRequest(token_ids=IDS),
    "token_ids of the most ids": pb.TokenizeRequest(token_ids=pb.TokenIds(ids=[9] * 262_144)),
    "chat.messages": pb.TokenizeRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x" * 2049)])
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH_TEXT)
async def test_tokens_of_more_text_than_tokenize_may_answer_are_refused_by_field(case: str) -> None:
    async with running_server(tokenizer=LongPieces()) as server:
        refusal = await refused(server.generation.Tokenize(TOO_MUCH_TEXT[case]))
        ids = pb.TokenIds(ids=[9] * 1000)
        answer = await server.generation.Tokenize(pb.TokenizeRequest(token_ids=ids))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refusal.fields == (case.partition(" ")[0],)
    assert "8388608 bytes" in refusal.message
    assert list(answer.pieces) == ["\N{TOP HAT}" * 1024] * 1000


async def test_an_answer_is_one_message_and_a_status_for_every_kind_of_client() -> None:
    async with running_server() as server:

        def ask() -> None:
            with grpc.insecure_channel(server.port.address) as channel:
                stub = GenerationServiceStub(channel)
                request = pb.TokenizeRequest(text="hat")
                answer, call = stub.Tokenize.with_call(request)
                assert call.code() is grpc.StatusCode.OK
                assert (call.details(), tuple(call.trailing_metadata())) == ("", ())
                assert stub.Tokenize.future(request).result() == answer == stub.Tokenize(request)
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Tokenize(pb.TokenizeRequest())
                keys = {key for key, _ in caught.value.trailing_metadata()}  # type: ignore[attr-defined]
                assert keys == {"grpc-status-details-bin"}

        await asyncio.to_thread(ask)
        header = adapter_pb2.UploadAdapterRequest(header=adapter_pb2.UploadHeader(task_id="hats"))

        async def messages() -> AsyncIterator[adapter_pb2.UploadAdapterRequest]:
            yield header

        calls: list[Awaitable[object]] = [
            server.adapters.UploadAdapter(messages()),
            server.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest()),
            server.server.GetServerInfo(server_pb2.GetServerInfoRequest()),
        ]
        assert all(await asyncio.gather(*calls))
