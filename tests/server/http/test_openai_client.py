"""The chat and completion routes through the ``openai`` package, which checks every answer strictly."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from manyhats.adapters.errors import AdapterInUseError, StoreFullError
from manyhats.engine.errors import DrainingError, EngineError, QueueFullError
from manyhats.server.http.writer import Writer
from support.fakes.server import eventually, make_record, running_server
from support.harnesses.openai_client import client_of
from support.servers.secure import add_token, secured_server

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PROMPT = "user:hi;"


async def test_a_chat_is_answered_whole() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.chat.completions.create(model="echo", messages=MESSAGES)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        PROMPT,
        "length",
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "echo"
    assert answer.id.startswith("chatcmpl-")


async def test_streamed_pieces_make_the_whole_answer() -> None:
    async with running_server() as server, client_of(server) as client:
        whole = await client.chat.completions.create(model="echo", messages=MESSAGES)
        stream = await client.chat.completions.create(
            model="echo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert [reason for reason in reasons if reason] == ["length"]
    assert reasons[-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


@pytest.mark.parametrize(
    ("prompt", "num_prompts"), [("abc", 1), ([70, 71], 1), (["abc", "de"], 2), ([[70, 71], [72]], 2)]
)
async def test_completions_whole_and_streamed(prompt: Any, num_prompts: int) -> None:
    # Chunks whose reason is null, as all servers send them, are not what the description says.
    async with (
        running_server() as server,
        client_of(server) as client,
        client_of(server, is_strict=False) as lax,
    ):
        whole = await client.completions.create(model="echo", prompt=prompt)
        assert [choice.index for choice in whole.choices] == list(range(num_prompts))
        texts = [""] * num_prompts
        async for chunk in await lax.completions.create(model="echo", prompt=prompt, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]


async def test_models_are_the_base_and_the_tasks() -> None:
    async with running_server() as server, client_of(server) as client:
        server.store.tasks["sql"] = [make_record("sql", labels={"default.temperature": "0"})]
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["echo", "sql"]
        assert (await client.models.retrieve("sql@1")).id == "sql@1"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        answer = await client.chat.completions.with_raw_response.create(model="sql", messages=MESSAGES)
        assert answer.headers["x-manyhats-version"] == "sql@1"
        assert server.engine.requests[-1].sampling.temperature == 0.0


async def test_faults_are_the_clients_own_errors() -> None:
    async with running_server() as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="echo", messages=MESSAGES, top_p=2)
        assert (caught.value.code, caught.value.param) == ("invalid_value", "top_p")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="echo", messages=MESSAGES, extra_body={"nonsense": 1})
        assert caught.value.param == "nonsense"
        server.engine.max_context_length = 4
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="echo", messages=MESSAGES)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_logprobs_fit_the_clients_types() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.chat.completions.create(model="echo", messages=MESSAGES, logprobs=True)
        content = answer.choices[0].logprobs
        assert content is not None
        assert content.content is not None
        assert [(each.token, each.logprob, each.bytes) for each in content.content][1] == ("u", -0.5, [117])


async def test_a_streams_logprobs_are_those_of_the_whole() -> None:
    asked: Any = {"model": "echo", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    async with running_server() as server, client_of(server) as client:
        whole = await client.chat.completions.create(**asked)
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    given = whole.choices[0].logprobs
    assert given is not None
    streamed = [
        token
        for chunk in chunks
        if (logprobs := chunk.choices[0].logprobs) is not None
        for token in logprobs.content or ()
    ]
    assert streamed == given.content
    assert {len(token.top_logprobs) for token in streamed} == {2}


async def test_completions_have_parallel_lists_of_logprobs_from_the_prompt_on() -> None:
    # The null of a prompt's first token, which all servers send, is not what the description says.
    asked: Any = {"model": "echo", "prompt": "abc", "logprobs": 2, "max_tokens": 2}
    async with (
        running_server() as server,
        client_of(server) as client,
        client_of(server, is_strict=False) as lax,
    ):
        plain = (await client.completions.create(**asked)).choices[0]
        echoed = (await lax.completions.create(**asked, echo=True)).choices[0]
        only = (await lax.completions.create(**{**asked, "max_tokens": 0}, echo=True)).choices[0]
    for choice, text, num_tokens in ((plain, "\x01a"[1:], 2), (echoed, "abca", 6), (only, "abc", 4)):
        assert choice.text == text
        lists = choice.logprobs
        assert lists is not None
        assert lists.tokens is not None
        assert "".join(lists.tokens) == text
        assert {
            len(lists.token_logprobs or ()),
            len(lists.top_logprobs or ()),
            len(lists.text_offset or ()),
        } == {num_tokens}
    assert echoed.logprobs is not None
    assert echoed.logprobs.token_logprobs == [None, *[-0.5] * 5]


async def test_several_answers_have_seeds_that_follow_each_other() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.chat.completions.create(model="echo", messages=MESSAGES, n=3, seed=7)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [asked.sampling.seed for asked in server.engine.requests] == [7, 8, 9]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(PROMPT) + 1
        assert answer.usage.completion_tokens == 3 * (len(PROMPT) + 1)
        await client.chat.completions.create(model="echo", messages=MESSAGES, seed=-1)
        assert server.engine.requests[-1].sampling.seed == 2**64 - 1


@pytest.mark.parametrize(("stop", "sequences"), [("x", ["x"]), (["x", "yz"], ["x", "yz"]), (None, [])])
async def test_stop_is_one_sequence_or_several(stop: Any, sequences: list[str]) -> None:
    async with running_server() as server, client_of(server) as client:
        await client.completions.create(model="echo", prompt="abc", stop=stop)
        assert list(server.engine.requests[-1].stopping.stop_sequences) == sequences


@pytest.mark.parametrize(
    ("error", "kind", "num_tries"),
    [
        (QueueFullError(4, 0.05), openai.RateLimitError, 3),
        (DrainingError(), openai.InternalServerError, 3),
        (AdapterInUseError("sql", "is in use"), openai.ConflictError, 1),
        (StoreFullError("store", "is full"), openai.InternalServerError, 1),
    ],
)
async def test_a_client_tries_again_what_may_pass_and_nothing_else(
    error: Exception, kind: type[openai.APIStatusError], num_tries: int
) -> None:
    async with running_server() as server, client_of(server, max_retries=2) as client:
        server.engine.error = error
        with pytest.raises(kind):
            await client.chat.completions.create(model="echo", messages=MESSAGES)
        assert len(server.engine.requests) == num_tries


async def test_a_busy_server_is_waited_for_as_long_as_it_says() -> None:
    async with running_server() as server, client_of(server, max_retries=5) as client:
        server.engine.error = QueueFullError(4, 0.02)
        asking = asyncio.create_task(client.chat.completions.create(model="echo", messages=MESSAGES))
        await eventually(lambda: len(server.engine.requests) > 1)
        server.engine.error = None
        assert (await asking).choices[0].message.content == PROMPT


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_fault_inside_a_stream_is_an_error_of_the_client(route: str) -> None:
    async with running_server() as server, client_of(server, is_strict=False) as client:
        server.engine.error, server.engine.error_after = EngineError("no more"), 2
        stream: Any
        if route == "chat":
            stream = await client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        else:
            stream = await client.completions.create(model="echo", prompt="abc", stream=True)
        assert await anext(stream)
        with pytest.raises(openai.APIError) as caught:
            [chunk async for chunk in stream]
    assert type(caught.value) is openai.APIError
    body: Any = caught.value.body
    assert body["type"] == "server_error"
    assert body["code"]


async def test_pings_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Writer.__init__.__kwdefaults__, "ping_s", 0.01)
    async with running_server() as server, client_of(server) as client:
        server.engine.step_s = 0.05
        asked: Any = {"model": "echo", "messages": MESSAGES, "max_tokens": 3, "stream": True}
        stream = await client.chat.completions.create(**asked)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == PROMPT[:2]
        raw = await client.chat.completions.with_raw_response.create(**asked)
        assert ": ping" in (await raw.http_response.aread()).decode()


@pytest.mark.parametrize("header", ["authorization", "api-key", "x-api-key"])
async def test_a_token_is_shown_in_any_header_of_the_field(header: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, "caller", tasks=["sql"])
    given: Any = {"Authorization": openai.Omit()}
    given[header.title()] = f"Bearer {token}" if header == "authorization" else token
    async with secured_server(token_file=path) as server:
        server.store.tasks["sql"] = [make_record("sql")]
        async with client_of(server) as client:
            assert [model.id async for model in client.models.list(extra_headers=given)] == ["sql"]
            with pytest.raises(openai.PermissionDeniedError) as refused:
                await client.chat.completions.create(model="echo", messages=MESSAGES, extra_headers=given)
            assert refused.value.code == "task_not_allowed"
        async with client_of(server) as client:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await client.models.list()
            assert unknown.value.code == "invalid_api_key"


async def test_azures_client_finds_the_models() -> None:
    # Its paths for answers name a deployment, which is no model's name; ``OpenAI`` is the client for those.
    async with (
        running_server() as server,
        openai.AsyncAzureOpenAI(
            base_url=f"http://{server.http}/v1",
            api_key="none",
            api_version="preview",
            max_retries=0,
            _strict_response_validation=True,
        ) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["echo"]


async def test_the_clients_request_id_is_the_servers() -> None:
    async with running_server() as server, client_of(server) as client:
        answer = await client.chat.completions.create(
            model="echo", messages=MESSAGES, extra_headers={"X-Request-Id": "mine"}
        )
    assert (answer._request_id, answer.id) == ("mine", "chatcmpl-mine")


async def test_routes_that_are_not_served_are_not_found() -> None:
    async with running_server() as server, client_of(server) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.moderations.create(model="echo", input="a")
    assert caught.value.code == "not_found"
