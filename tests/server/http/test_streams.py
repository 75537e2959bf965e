"""Streams of events: faults before and after the first, silence, and readers that are slow, or gone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from manyhats.engine.errors import NumericalError, QueueFullError
from manyhats.server.http import writer as writing
from support.fakes.server import LIMITS, Running, eventually, make_record, running_server
from support.harnesses.http import exchange, request

PATH = "/v1/completions"


def body(**fields: Any) -> bytes:
    return request(PATH, {"prompt": "abcdef", "stream": True, **fields})


def events_of(data: bytes) -> list[Any]:
    """What the events of a stream say; comments and the end as they are."""
    return [
        json.loads(each.removeprefix("data: ")) if each.startswith("data: {") else each
        for each in data.decode().split("\n\n")
        if each
    ]


def counted(server: Running, code: str) -> float | None:
    labels = {"task": "_base", "method": "Completions", "code": code}
    return server.metrics.registry.get_sample_value("manyhats_requests_total", labels)


async def test_a_fault_before_the_first_output_is_a_status() -> None:
    async with running_server() as server:
        server.engine.error = QueueFullError(4, 0.5)
        reply = await exchange(server.http, body())
        assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
        assert counted(server, "RESOURCE_EXHAUSTED") == 1


async def test_a_fault_after_it_is_an_event_and_then_the_end() -> None:
    async with running_server() as server:
        server.engine.error, server.engine.error_after = (
            NumericalError("not finite"),
            3,
        )  # the first is no text
        reply = await exchange(server.http, body())
        *pieces, fault, done = events_of(reply.body)
        assert (reply.status, len(pieces), done) == (200, 2, "data: [DONE]")
        assert fault["error"] == {
            "message": "not finite",
            "type": "server_error",
            "param": None,
            "code": "numerical_error",
        }
        assert counted(server, "INTERNAL") == 1


async def test_a_streamed_prompt_is_shown_though_the_first_token_has_no_text() -> None:
    async with running_server() as server:
        reply = await exchange(server.http, body(prompt_logprobs=1))
        (shown,) = (
            choice["prompt_logprobs"]
            for event in events_of(reply.body)[:-1]
            for choice in event["choices"]
            if "prompt_logprobs" in choice
        )
        assert len(shown) == 7


async def test_all_prompts_of_a_call_run_on_one_version_and_not_all_at_once() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.001
        versions = iter(range(1, 1000))
        server.store.resolve = lambda name: make_record("sql", next(versions))
        most = 0

        async def count() -> None:
            nonlocal most
            while True:
                most = max(most, server.engine.running)
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        asked = {"model": "sql", "prompt": ["ab"] * 40, "n": 16, "max_tokens": 3}
        reply = await exchange(server.http, request(PATH, asked))
        counting.cancel()
        assert reply.headers["x-manyhats-version"] == "sql@1"
        assert len(reply.json["choices"]) == 640
        assert {each.adapter.name for each in server.engine.requests if each.adapter} == {"sql@1"}
        assert most <= LIMITS.max_sequences + 16


async def test_silence_is_broken_by_comments_also_before_the_first_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "PING_S", 0.05)
    async with running_server() as server:
        server.engine.step_s = 0.16
        reply = await exchange(server.http, body(max_tokens=2))
        events = events_of(reply.body)
        assert events[0] == ": ping"
        assert events.count(": ping") >= 4
        # The first token has no text, so that nothing is sent for it.
        server.engine.error, server.engine.error_after = NumericalError("not finite"), 1
        reply = await exchange(server.http, body())
        assert reply.status == 200
        *pings, fault, done = events_of(reply.body)
        assert (set(pings), done) == ({": ping"}, "data: [DONE]")
        assert fault["error"]["code"] == "numerical_error"


async def test_a_reader_that_reads_nothing_is_left_and_frees_its_row() -> None:
    async with running_server(unread_limit_s=0.3) as server:
        server.engine.max_context_length = 10**7
        host, _, port = server.http.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        long = {"prompt": "a" * 500_000, "stream": True, "max_tokens": 500_000}
        writer.write(request(PATH, long))
        await eventually(lambda: server.engine.running == 1)
        await eventually(lambda: server.engine.running == 0, 30)
        await eventually(lambda: counted(server, "RESOURCE_EXHAUSTED") == 1)
        writer.close()


async def test_a_whole_answer_that_nobody_reads_is_left_too() -> None:
    async with running_server(unread_limit_s=0.3) as server:
        server.engine.max_context_length = 10**7
        host, _, port = server.http.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(
            request(PATH, {"prompt": "a" * 200_000, "echo": True, "logprobs": 1, "n": 6, "max_tokens": 1})
        )
        await eventually(lambda: counted(server, "RESOURCE_EXHAUSTED") == 1, 30)
        writer.close()


async def test_a_connection_that_reads_no_answer_of_any_route_is_closed() -> None:
    async with running_server(unread_limit_s=0.1) as server:
        host, _, port = server.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        last = b"connection: close\r\n"
        one = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n%b\r\n"
        writer.write(one % b"" * 199 + one % last)
        await asyncio.sleep(1.5)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            assert 0 < (await reader.read()).count(b"HTTP/1.1 200 OK") < 200
        writer.close()


async def test_many_requests_on_one_connection() -> None:
    async with running_server() as server:
        host, _, port = server.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        whole = request(PATH, {"prompt": "ab"})
        writer.write(whole * 5)
        for _ in range(5):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := await reader.readline()) != b"\r\n":
                if line.startswith(b"content-length"):
                    length = int(line.partition(b":")[2])
            assert json.loads(await reader.readexactly(length))["choices"][0]["text"]
        writer.close()
