"""``/v1/responses`` through the ``openai`` package, which checks every answer and event strictly."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from manyhats.engine.errors import FieldInvalidError, NumericalError
from support.fakes.server import running_server
from support.harnesses.http import exchange, request
from support.harnesses.openai_client import client_of

PATH = "/v1/responses"


async def test_an_answer_is_that_of_the_chat() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.responses.create(
            model="echo", input="hi", instructions="Be brief.", top_logprobs=0, metadata={"a": "b"}
        )
        chat = await client.chat.completions.create(
            model="echo",
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            logprobs=True,
        )
        assert answer.output_text == chat.choices[0].message.content
        assert (answer.status, answer.model, answer.metadata) == ("incomplete", "echo", {"a": "b"})
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage is not None
        assert chat.usage is not None
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        assert answer.usage.output_tokens == chat.usage.completion_tokens
        assert answer.usage.input_tokens_details.cached_tokens == 1
        part: Any = answer.output[0].content[0]  # type: ignore[union-attr]
        assert [token.logprob for token in part.logprobs] == [-0.5] * answer.usage.output_tokens
        assert (answer.id.startswith("resp_"), answer.output[0].id.startswith("msg_")) == (True, True)  # type: ignore[union-attr]


async def test_items_of_a_conversation_become_its_messages() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.responses.create(
            model="echo",
            input=[
                {"role": "user", "content": "a"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "b", "annotations": []}],
                },
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "c"}, {"type": "input_text", "text": "d"}],
                },
            ],
        )
        assert answer.output_text == "user:a;assistant:b;user:cd;"


async def test_events_come_in_order_and_make_the_answer() -> None:
    async with running_server() as server, client_of(server) as client:
        whole = await client.responses.create(model="echo", input="hi")
        events = [
            event async for event in await client.responses.create(model="echo", input="hi", stream=True)
        ]
    kinds = [event.type.removeprefix("response.") for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] == begin
    assert kinds[-4:] == end
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last: Any = events[-1]
    assert "".join(deltas) == whole.output_text == last.response.output_text
    assert last.response.usage == whole.usage


async def test_a_fault_in_mid_stream_is_the_last_event() -> None:
    async with running_server() as server, client_of(server) as client:
        server.engine.error, server.engine.error_after = NumericalError("not finite"), 3
        stream = await client.responses.create(model="echo", input="hi", stream=True)
        events = [event async for event in stream]
        last: Any = events[-1]
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert (last.response.error.code, last.response.error.message) == ("server_error", "not finite")
        labels = {"task": "_base", "method": "Responses", "code": "INTERNAL"}
        assert server.metrics.registry.get_sample_value("manyhats_requests_total", labels) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "schema": {"$ref": "http://a"}}}}, "text.format.schema"),
        ({"input": "a" * 2000}, "input"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "no-such"}, "model"),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_its_field(fields: Any, param: str) -> None:
    async with running_server() as server:
        reply = await exchange(server.http, request(PATH, {"input": "a", **fields}))
        assert (reply.status, reply.error["type"]) == (
            404 if param == "model" else 400,
            "invalid_request_error",
        )
        assert reply.error["param"].startswith(param)


@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_engine_refuses_has_the_fields_name_too(stream: bool) -> None:
    async with running_server() as server:
        server.engine.error = FieldInvalidError("json_schema", "has an unknown keyword")
        reply = await exchange(server.http, request(PATH, {"input": "a", "stream": stream}))
        assert (reply.status, reply.error["param"]) == (400, "text.format.schema")


async def test_the_client_raises_its_own_errors() -> None:
    async with running_server() as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="echo", input="a" * 2000)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
