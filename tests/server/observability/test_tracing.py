"""The span of each call, through both ports, and the trace in its log lines."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from manyhats.server.observability.tracing import Tracing
from manyhats.v1 import adapter_pb2, encoding_pb2
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, eventually, refused, running_server
from support.harnesses.http import Reply, exchange, request

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
SECRET = "the quick brown fox"


@dataclass(frozen=True)
class Traced:
    """A server, and its spans."""

    server: Running
    exporter: InMemorySpanExporter

    async def span(self) -> ReadableSpan:
        """The only one."""
        (span,) = await self.spans(1)
        return span

    async def spans(self, count: int) -> list[ReadableSpan]:
        """All of them, once there are so many: a call's caller may learn of its end before its span is made."""
        await eventually(lambda: len(self.exporter.get_finished_spans()) >= count)
        spans = list(self.exporter.get_finished_spans())
        assert len(spans) == count
        self.exporter.clear()
        return spans

    async def post(self, path: str, body: dict[str, Any], *headers: str) -> Reply:
        return await exchange(self.server.http, request(path, body, *headers))


@asynccontextmanager
async def traced() -> AsyncIterator[Traced]:
    exporter = InMemorySpanExporter()
    async with running_server(tracing=Tracing(SimpleSpanProcessor(exporter), "9.9")) as server:
        await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id="sql", uri="a"))
        found = Traced(server, exporter)
        registration = await found.span()
        assert registration.name == "RegisterAdapter sql"
        yield found


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "sql", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, **fields}


async def test_a_chat_over_http_is_a_span_of_its_callers_trace() -> None:
    began_ns = time.time_ns()
    async with traced() as found:
        body = chat(temperature=0.5, top_p=0.9, seed=7)
        reply = await found.post("/v1/chat/completions", body, f"traceparent: {PARENT}", "x-request-id: r1")
        span = await found.span()
    assert reply.status == 200
    assert (span.name, span.kind, span.status.status_code) == ("chat sql", SpanKind.SERVER, StatusCode.UNSET)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert span.parent.is_remote
    attributes = dict(span.attributes or {})
    millis = {name: attributes.pop(f"manyhats.{name}_ms") for name in ("queue", "prefill", "decode")}
    assert all(isinstance(each, float) and each >= 0 for each in millis.values())
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "manyhats",
        "gen_ai.request.model": "sql",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.response.model": "sql@1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": reply.json["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 3,
        "manyhats.cached_prompt_tokens": attributes["manyhats.cached_prompt_tokens"],
        "manyhats.adapter_load_ms": attributes["manyhats.adapter_load_ms"],
        "manyhats.method": "ChatCompletions",
        "manyhats.request_id": "r1",
    }
    assert span.resource.attributes["service.name"] == "manyhats"
    assert span.resource.attributes["service.version"] == "9.9"
    events = {event.name: event.timestamp for event in span.events}
    assert span.start_time is not None
    assert span.end_time is not None
    times = [began_ns, span.start_time, events["queued"], events["first_token"], span.end_time]
    assert times == sorted(times)
    assert span.end_time <= time.time_ns()


async def test_a_stream_over_grpc_is_a_span_with_what_its_usage_says() -> None:
    async with traced() as found:
        asked = pb.GenerateRequest(task_id="sql@1", text=SECRET, num_sequences=2, request_id="mine")
        asked.stopping.max_new_tokens = 4
        asked.sampling.seed = 2**64 - 1
        asked.sampling.temperature = 1
        call = found.server.generation.GenerateStream(asked, metadata=(("traceparent", PARENT),))
        pieces = [piece async for piece in call]
        span = await found.span()
    usages = {piece.sequence_index: piece.usage for piece in pieces if piece.finish_reason}
    attributes = dict(span.attributes or {})
    assert span.name == "text_completion sql@1"
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE
    assert attributes["gen_ai.response.model"] == "sql@1"
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert attributes["gen_ai.usage.input_tokens"] == usages[0].prompt_tokens  # computed once
    assert attributes["gen_ai.usage.output_tokens"] == 8
    assert attributes["gen_ai.request.seed"] == -1  # an attribute has a sign
    assert attributes["manyhats.queue_ms"] == pytest.approx(max(each.queue_ms for each in usages.values()), 1)
    assert attributes["manyhats.request_id"] == "mine"


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 2}, "text_completion echo"),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 2, "stream": True}, "text_completion echo"),
        ("/v1/chat/completions", {**chat(stream=True), "model": ""}, "chat echo"),
        ("/v1/responses", {"input": SECRET, "max_output_tokens": 2}, "chat echo"),
        ("/v1/score", {"prompt": SECRET, "continuations": ["a"]}, "score echo"),
        ("/v1/embeddings", {"input": SECRET}, "embeddings echo"),
        ("/tokenize", {"prompt": SECRET}, "Tokenize"),
    ],
)
async def test_every_call_is_one_span_and_none_has_anything_of_a_prompt(
    path: str, body: dict[str, Any], name: str
) -> None:
    async with traced() as found:
        reply = await found.post(path, body)
        span = await found.span()
    assert reply.status == 200, reply.body
    assert span.name == name
    assert span.parent is None
    assert SECRET not in span.to_json()
    if " " in name:
        assert dict(span.attributes or {})["gen_ai.usage.input_tokens"] > 0  # type: ignore[operator]


async def test_scores_and_vectors_over_grpc_have_spans() -> None:
    async with traced() as found:
        score = pb.ScoreRequest(task_id="sql", text="a", continuations=[pb.Continuation(text="b")])
        await found.server.generation.Score(score)
        await found.server.encoding.Embed(
            encoding_pb2.EmbedRequest(inputs=[encoding_pb2.TextInput(text="ab")])
        )
        names = [span.name for span in await found.spans(2)]
    assert names == ["score sql", "embeddings echo"]


async def test_what_fails_says_so_and_whose_fault_it_is() -> None:
    async with traced() as found:
        await refused(found.server.generation.Generate(pb.GenerateRequest(task_id="nobody", text=SECRET)))
        unknown = await found.span()
        found.server.engine.error, found.server.engine.error_after = KeyError(SECRET), 1
        reply = await found.post("/v1/chat/completions", chat(stream=True))
        broken = await found.span()
    assert (unknown.name, unknown.status.status_code) == ("Generate nobody", StatusCode.UNSET)
    assert dict(unknown.attributes or {})["error.type"] == "NOT_FOUND"
    assert b"error" in reply.body
    assert (broken.name, broken.status.status_code) == ("chat sql", StatusCode.ERROR)
    assert dict(broken.attributes or {})["error.type"] == "INTERNAL"
    assert dict(broken.attributes or {})["gen_ai.usage.output_tokens"] == 1
    assert SECRET not in broken.to_json()


async def test_a_call_that_is_cancelled_has_a_span_of_what_it_got() -> None:
    async with traced() as found:
        found.server.engine.step_s = 0.05
        call = found.server.generation.GenerateStream(pb.GenerateRequest(text="abcdefgh"))
        await call.read()
        call.cancel()
        span = await found.span()
    assert dict(span.attributes or {})["error.type"] == "CANCELLED"
    assert [event.name for event in span.events] == ["queued", "first_token"]


async def test_a_trace_that_its_caller_does_not_keep_is_not_kept_here() -> None:
    async with traced() as found:
        unkept = f"traceparent: 00-{TRACE}-{SPAN}-00"
        await found.post("/v1/chat/completions", chat(), unkept)
        await found.post("/v1/chat/completions", chat())
        span = await found.span()
    assert span.parent is None


async def test_names_from_outside_are_cut_short() -> None:
    async with traced() as found:
        await found.post("/v1/chat/completions", chat(model="\u202e" + "x" * 10_000))
        span = await found.span()
    assert len(span.name) < 300
    assert "\u202e" not in span.name


async def test_log_lines_of_a_call_show_its_trace_even_if_none_is_exported() -> None:
    async with running_server() as server:
        with capture_logs(processors=[merge_contextvars]) as logs:
            body = request("/v1/chat/completions", chat(model=""), f"traceparent: {PARENT}")
            await exchange(server.http, body)
            metadata = (("traceparent", PARENT),)
            await server.generation.Generate(pb.GenerateRequest(text="a"), metadata=metadata)
            await server.generation.Generate(pb.GenerateRequest(text="a"))
    calls = [line for line in logs if line["event"] == "call"]
    assert [line.get("trace_id") for line in calls] == [TRACE, TRACE, None]


async def test_log_lines_and_span_of_a_trace_that_begins_here_have_one_id() -> None:
    async with traced() as found:
        with capture_logs(processors=[merge_contextvars]) as logs:
            for _ in range(2):
                await found.post("/v1/chat/completions", chat())
        spans = await found.spans(2)
    logged = [line["trace_id"] for line in logs if line["event"] == "call"]
    assert [f"{span.context.trace_id:032x}" for span in spans if span.context] == logged
    assert len(set(logged)) == 2
