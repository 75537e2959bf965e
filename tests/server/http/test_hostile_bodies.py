"""Bodies and heads that no honest client sends: each has its status, and the port goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import grpc
import pytest
import pytest_asyncio

from manyhats.server.http.body import MAX_BODY_BYTES
from manyhats.server.service.errors import MessagesError
from manyhats.server.service.gate import MAX_MESSAGE_BYTES, Gate
from manyhats.v1 import generation_pb2 as pb
from support.fakes.server import Running, eventually, refused, running_server
from support.harnesses.http import Reply, exchange, head, read_reply, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
GOOD: Any = {"messages": [USER]}
DEEP = 100_000


def changed(**fields: Any) -> Any:
    return {**GOOD, **fields}


def nested(depth: int, begin: str = "[", end: str = "]") -> str:
    return begin * depth + end * depth


def with_raw(field: str, raw: str) -> str:
    """A good chat whose field has this text, whatever it is."""
    return f'{{"messages":[{{"role":"user","content":"hi"}}],"{field}":{raw}}}'


def not_json() -> Iterator[tuple[str, bytes | str, str]]:
    texts: dict[str, bytes | str] = {
        "empty": "",
        "a space": " ",
        "half": '{"messages": [',
        "two": '{"messages":[]}{"messages":[]}',
        "trailing comma": '{"messages":[],}',
        "single quotes": "{'messages':[]}",
        "comment": '/* */{"messages":[]}',
        "nan": with_raw("temperature", "NaN"),
        "infinity": with_raw("temperature", "Infinity"),
        "minus infinity": with_raw("temperature", "-Infinity"),
        "too large": with_raw("temperature", "1e999"),
        "leading zero": with_raw("seed", "01"),
        "plus": with_raw("seed", "+1"),
        "hexadecimal": with_raw("seed", "0x10"),
        "bare word": with_raw("stop", "yes"),
        "latin-1": '{"messages":[{"role":"user","content":"é"}]}'.encode("latin-1"),
        "utf-16": json.dumps(GOOD).encode("utf-16"),
        "utf-8 mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        "nul": b"\0",
        "random": bytes(range(256)),
        "overlong": b'{"messages":[{"role":"user","content":"\xc0\xaf"}]}',
        "surrogate bytes": b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
        "raw newline": '{"messages":[{"role":"user","content":"a\nb"}]}',
        "lone surrogate": '{"messages":[{"role":"user","content":"\\ud800"}]}',
        "deep list": nested(DEEP),
        "deep open": "[" * DEEP,
        "deep object": nested(DEEP, '{"a":', "}"),
        "deep in ignored": with_raw("metadata", nested(DEEP)),
        "deep in a schema": with_raw("guided_json", nested(DEEP, '{"a":', "}").replace(":}", ":1}", 1)),
    }
    places = {"too large": "temperature"}
    for name, text in texts.items():
        yield name, text, places.get(name, "body")


def wrong_shapes() -> Iterator[tuple[str, Any, str]]:
    for name, value in {"list": [], "text": "x", "number": 1, "null": None, "true": True}.items():
        yield f"a {name} for a body", json.dumps(value), "body"
    yield "no messages", {}, "messages"
    yield "null messages", {"messages": None}, "messages"
    yield "no message", {"messages": []}, "messages"
    yield "text for messages", {"messages": "hi"}, "messages"
    yield "too many messages", {"messages": [USER] * 1025}, "messages"
    yield "no role", {"messages": [{"content": "hi"}]}, "messages[0].role"
    yield "empty role", {"messages": [{"role": "", "content": "a"}]}, "messages[0].role"
    yield "long role", {"messages": [{"role": "x" * 65, "content": "a"}]}, "messages[0].role"
    yield "no content", {"messages": [{"role": "user"}]}, "messages[0].content"
    yield "number for content", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}
    yield "an image", {"messages": [{"role": "user", "content": [image]}]}, "messages[0].content[0].type"
    yield (
        "a part of no type",
        {"messages": [{"role": "user", "content": [{}]}]},
        "messages[0].content[0]",
    )
    yield "a message's unknown field", {"messages": [{**USER, "x": 1}]}, "messages[0].x"
    yield "too much text", {"messages": [{"role": "user", "content": "é" * 600_000}]}, "messages"
    yield (
        "tool calls of a user",
        {"messages": [{**USER, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}]},
        "messages[0].tool_calls",
    )
    yield (
        "arguments that are not JSON",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    )
    yield "a function call of old", {"messages": [{**USER, "function_call": {}}]}, "messages[0].function_call"


WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    "model": (1, [], {}),
    "temperature": ("1", [], True),
    "top_p": ("x", {}),
    "top_k": (1.5, "all"),
    "seed": (1.5, "x"),
    "stop": (1, [1], {}),
    "stop_token_ids": ([1.5], "x", ["a"]),
    "max_tokens": ("5", 1.5),
    "logit_bias": ([], {"a": "b"}, {"x": 1}),
    "n": ("1", 1.5),
    "stream": ("true", 1),
    "stream_options": ([], {"x": 1}, True),
    "logprobs": (3, "x"),
    "response_format": ("json", {"type": "xml"}, {}, {"type": "json_schema"}),
    "structured_outputs": ([], {"x": 1}, {}),
    "guided_choice": ("a", [1]),
    "tools": ({}, "x", [1]),
    "tool_choice": (1, "any", {}, {"type": "function"}, {"type": "auto"}, {"function": {"name": 1}}, [True]),
    "parallel_tool_calls": ("no", 1),
    "chat_template_kwargs": ([], "x"),
    "modalities": (["audio"], "text"),
    "priority": ("high", 1.5),
    "cache_salt": (1, []),
}
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 100.1, 1e300),
    "top_p": (0, -1, 1.1),
    "top_k": (-2, -(10**30)),
    "min_p": (-0.1, 1.1),
    "typical_p": (0, 2),
    "frequency_penalty": (-101, 101),
    "presence_penalty": (-101, 101),
    "repetition_penalty": (0, -1, 101),
    "seed": (2**64, -(2**63) - 1, 10**100),
    "max_tokens": (0, -1),
    "max_completion_tokens": (0, -1),
    "stop": ("", [""], ["x"] * 17, "x" * 257),
    "n": (0, -1, 17, 10**12),
    "top_logprobs": (-1, 21, 10**30),
    "prompt_logprobs": (-1, 21),
    "cache_salt": ("x" * 257,),
    "priority": (2**31 + 1, -(2**31), 10**30),
    "request_id": ("x" * 129, "a\nb", "\u0000"),
    "logit_bias": ({str(i): 1 for i in range(1025)}, {"1": 1e5}),
    "stop_token_ids": (list(range(257)),),
}


F: Any = {"type": "function", "function": {"name": "f"}}


def function(**fields: Any) -> Any:
    return [{"type": "function", "function": {"name": "f", **fields}}]


def bad_tools() -> Iterator[tuple[str, Any, str]]:
    yield "tools of no kind", changed(tools=[{}]), "tools[0]"
    yield "tools of another kind", changed(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0]"
    yield "too many tools", changed(tools=[F] * 129), "tools"
    yield "one tool twice", changed(tools=[F, F]), "tools[1].function.name"
    for name in ("", "a b", "x" * 65, "a\u0000", '"', "</tool_call>", None, 1):
        yield f"a function named {name!r:.20}", changed(tools=function(name=name)), "tools[0].function.name"
    deep: Any = {}
    for _ in range(33):
        deep = {"properties": {"a": deep}}
    path = "tools[0].function.parameters"
    yield "parameters in words", changed(tools=function(parameters="none")), path
    yield "parameters of a list", changed(tools=function(parameters={"type": "array"})), path
    yield "deep parameters", changed(tools=function(parameters=deep)), "tools"
    yield "much larger ones", changed(tools=function(parameters={"title": "x" * 300_000})), "tools"
    yield "a call of nothing", changed(tool_choice="required"), "tool_choice"
    yield "a call of another", changed(tools=[F], tool_choice={"function": {"name": "g"}}), "tool_choice"


def bad_fields() -> Iterator[tuple[str, Any, str]]:
    for field, values in WRONG_TYPES.items():
        for value in values:
            yield f"{field} {value!r}"[:60], changed(**{field: value}), field
    for field, values in OUT_OF_RANGE.items():
        for value in values:
            shown = "max_tokens" if field == "max_completion_tokens" else field
            extra = {"logprobs": True} if field == "top_logprobs" else {}
            yield f"{field} {str(value)[:40]}", changed(**{field: value}, **extra), shown
    for field in ("temperatur", "__class__", "", "messages\u0000", "template", "chat_template", "functions"):
        yield f"unknown {field!r}", changed(**{field: 1}), field
    yield "top_logprobs alone", changed(top_logprobs=3), "top_logprobs"
    yield "options of no stream", changed(stream_options={}), "stream_options"
    yield "two constraints", changed(guided_regex="a", guided_choice=["b"]), "response_format"
    yield "another alias", changed(model="sql", lora_path="other"), "model"
    yield "min over max", changed(max_tokens=2, min_tokens=3), "min_tokens"


REFUSED = [*not_json(), *wrong_shapes(), *bad_fields(), *bad_tools()]
PROMPTS: list[tuple[str, Any]] = [
    ("none", {}),
    ("null", {"prompt": None}),
    ("empty", {"prompt": ""}),
    ("no prompts", {"prompt": []}),
    ("an empty one", {"prompt": [[]]}),
    ("mixed", {"prompt": ["a", 1]}),
    ("too many", {"prompt": ["a"] * 257}),
    ("negative", {"prompt": [-1]}),
    ("outside", {"prompt": [10**9]}),
    ("huge", {"prompt": [10**40]}),
    ("fraction", {"prompt": [1.5]}),
    ("deeper", {"prompt": [[[1]]]}),
    ("suffix", {"prompt": "a", "suffix": "b"}),
    ("best_of", {"prompt": "a", "best_of": 3}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Running]:
    async with running_server() as running:
        yield running


async def post(server: Running, path: str, body: Any) -> Reply:
    return await exchange(server.http, request(path, body))


def served(server: Running) -> list[Any]:
    """What reached the engine since the last time."""
    requests = list(server.engine.requests)
    server.engine.requests.clear()
    return requests


@pytest.mark.parametrize(("name", "body", "param"), REFUSED, ids=[each[0] for each in REFUSED])
async def test_a_bad_chat_is_refused_by_its_field(server: Running, name: str, body: Any, param: str) -> None:
    reply = await post(server, CHAT, body)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error"), reply
    assert reply.error["param"].startswith(param)
    assert len(reply.body) < 10_000
    assert not served(server)


@pytest.mark.parametrize(("name", "body"), PROMPTS, ids=[each[0] for each in PROMPTS])
async def test_a_bad_prompt_is_refused(server: Running, name: str, body: Any) -> None:
    reply = await post(server, COMPLETIONS, body)
    assert reply.status == 400, reply
    assert not served(server)


def heads() -> Iterator[tuple[str, bytes, set[int]]]:
    body = json.dumps(GOOD).encode()
    size = len(body)
    yield "no content type", head(CHAT, size, "content-type: ") + body, {415}
    yield "a form", head(CHAT, size, "content-type: application/x-www-form-urlencoded") + body, {415}
    yield "a page's text", head(CHAT, size, "content-type: text/plain") + body, {415}
    yield "too long a body", head(CHAT, MAX_BODY_BYTES + 1), {413}
    yield "a length past all", head(CHAT, 2**63 - 1), {413}
    yield "a length past 64 bits", head(CHAT, 2**70), {400}
    yield "a negative length", head(CHAT, None, "content-length: -1"), {400}
    yield "a length in words", head(CHAT, None, "content-length: ten"), {400}
    yield "two lengths", head(CHAT, size, "content-length: 3") + body, {400}
    yield "length and chunks", head(CHAT, size, "transfer-encoding: chunked") + b"0\r\n\r\n", {400}
    yield "chunks of no size", head(CHAT, None, "transfer-encoding: chunked") + b"zz\r\n", {400}
    yield (
        "unknown coding",
        head(CHAT, None, "transfer-encoding: gzip, chunked") + b"0\r\n\r\n",
        {400, 415, 501},
    )
    yield "a folded header", head(CHAT, size, "a: b\r\n c") + body, {400}
    yield "a header of no name", head(CHAT, size, ": b") + body, {400}
    yield "a space in a name", head(CHAT, size, "a b: c") + body, {400}
    yield "a nul in a value", head(CHAT, size, "a: b\0c") + body, {400}
    yield "many headers", head(CHAT, size, *(f"a{i}: b" for i in range(1000))) + body, {400, 431}
    yield "a long header", head(CHAT, size, "a: " + "b" * 100_000) + body, {400, 431}
    yield "a long path", head("/" + "a" * 100_000, 0), {400, 431}
    yield "no version", b"GET /healthz\r\n\r\n", {0, 200, 400}
    yield "another protocol", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {0, 400}
    yield "http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400}
    yield "no method", b" / HTTP/1.1\r\n\r\n", {0, 400}
    yield "an unknown method", head(CHAT, 0, method="FETCH"), {400, 405}
    yield "connect", b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", {400, 403, 404}
    yield "upgrade", head(CHAT, 0, "connection: upgrade", "upgrade: websocket", method="GET"), {405}
    yield "another host", b"GET /readyz HTTP/1.1\r\nhost: evil.example\r\n\r\n", {403}
    yield "a host that begins well", b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1.evil.example\r\n\r\n", {403}
    yield "two hosts", b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n", {400, 403}
    yield "a path upwards", head("/../../etc/passwd", 0, method="GET"), {404}
    yield "a path in code", head("/v1/models/%2e%2e%2f%00", 0, method="GET"), {400, 404}
    yield "bytes in a path", b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 404}
    yield "another's route", head("/v1/audio/speech", 2) + b"{}", {404}
    yield "the wrong method", head(CHAT, 0, method="GET"), {405}
    yield "a long request id", head(CHAT, size, "x-request-id: " + "a" * 129) + body, {400}


HEADS = list(heads())


@pytest.mark.parametrize(("name", "data", "statuses"), HEADS, ids=[each[0] for each in HEADS])
async def test_a_bad_head_is_refused(server: Running, name: str, data: bytes, statuses: set[int]) -> None:
    reply = await exchange(server.http, data)
    assert reply.status in statuses, reply
    if reply.status >= 400:
        assert reply.error["message"]
    assert (await exchange(server.http, head("/healthz", None, method="GET"))).status == 200


async def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) + len(PROMPTS) + len(HEADS) >= 150


async def test_of_a_repeated_key_the_last_decides_and_is_the_one_that_is_authorized(server: Running) -> None:
    reply = await post(
        server, CHAT, '{"model":"echo","messages":[{"role":"user","content":"a"}],"model":"no"}'
    )
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


async def test_the_rest_of_a_body_that_is_too_long_is_not_read(server: Running) -> None:
    reply = await exchange(
        server.http, head(CHAT, None, "transfer-encoding: chunked") + chunks(b" " * 65536, 65)
    )
    assert (reply.status, reply.headers["connection"]) == (413, "close")


def chunks(piece: bytes, num: int) -> bytes:
    return (b"%x\r\n%b\r\n" % (len(piece), piece)) * num


async def test_a_body_that_stops_is_given_up() -> None:
    async with running_server(body_limit_s=0.2, head_limit_s=0.2) as server:
        reply = await exchange(server.http, head(CHAT, 100) + b"{")
        assert (reply.status, reply.error["code"]) == (504, "upload_stalled")
        half = head(CHAT, 100)[:40]
        assert (await exchange(server.http, half, timeout_s=20)).status == 0


async def test_bodies_that_arrive_slowly_are_bounded_in_time_and_together() -> None:
    async with running_server(body_limit_s=0.2) as server:
        host, _, port = server.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head(CHAT, 1000) + b"{")
        reading = asyncio.create_task(read_reply(reader))
        while not reading.done():  # a byte in time, each time
            writer.write(b" ")
            await asyncio.sleep(0.1)
        assert (await reading).status == 504
        writer.close()
    gate = Gate(heartbeat_limit_s=1.0, max_message_bytes=100)
    with gate.message() as first, gate.message() as second:
        first(60)
        with pytest.raises(MessagesError):
            second(41)
        second(40)
    with gate.message() as third:
        third(100)


async def test_messages_of_both_ports_are_bounded_together_for_as_long_as_their_calls_last() -> None:
    text = "a" * 100_000
    large = pb.TokenizeRequest(text=text)
    async with running_server() as server:
        with server.gate.message() as take:
            take(MAX_MESSAGE_BYTES - 1000)
            refusal = await refused(server.generation.Tokenize(large))
            assert (refusal.reason, refusal.code) == ("QUEUE_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert refusal.retry_s is not None
            reply = await post(server, "/tokenize", {"prompt": text})
            assert reply.status == 429
            assert "retry-after" in reply.headers
            await server.generation.Tokenize(pb.TokenizeRequest(text="a"))
            assert (await post(server, "/tokenize", {"prompt": "a"})).status == 200
        await server.generation.Tokenize(large)
        assert (await post(server, "/tokenize", {"prompt": text})).status == 200
        with server.gate.message() as take:
            take(MAX_MESSAGE_BYTES)  # nothing is left of any call


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (with_raw("metadata", "[" + "[]," * 40_000 + "[]]"), "32768 objects and lists"),
        (with_raw("metadata", "{" + '"":1,' * 140_000 + '"":1}'), "131072 strings and names"),
        (with_raw("metadata", "[" + "1," * 600_000 + "1]"), "524288 values"),
    ],
)
async def test_bodies_of_very_many_parts_are_refused_before_they_are_decoded(
    server: Running, body: str, what: str
) -> None:
    reply = await post(server, CHAT, body)
    assert (reply.status, reply.error["param"]) == (400, "body")
    assert what in reply.error["message"]


async def test_brackets_and_commas_in_texts_are_no_parts(server: Running) -> None:
    text = '[{,}]:\\\\\\"' * 20_000
    reply = await post(server, "/tokenize", json.dumps({"prompt": text}))
    assert reply.status == 200
    assert reply.json["count"] == len(text) + 1


async def test_streams_go_on_beside_hostile_bodies() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.02
        gaps: list[float] = []

        async def stream() -> None:
            host, _, port = server.http.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request(COMPLETIONS, {"prompt": "a" * 99, "max_tokens": 90, "stream": True}))
            times = []
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    times.append(asyncio.get_running_loop().time())
                if line == b"data: [DONE]\n":
                    break
            writer.close()
            gaps.extend(after - before for before, after in pairwise(times))

        streaming = asyncio.create_task(stream())
        await eventually(lambda: server.engine.running == 1)
        small = [body for _, body, _ in REFUSED if len(body if isinstance(body, bytes | str) else "") < 1000]
        for body in small:
            assert (await post(server, CHAT, body)).status == 400
        await streaming
        assert len(gaps) >= 80
        assert max(gaps) < 20 * median(gaps)  # a bound for a broken server, not a measurement
