"""gRPC and HTTP are two ways to one service: the same answers to the same requests, the same faults, by field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from manyhats.server.http.status import KINDS, param_of
from manyhats.v1 import generation_pb2 as pb
from support.factories.tiny_models import make_checkpoint
from support.fakes.server import Running, eventually, refused, running_server
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import Served, served_engine
from support.harnesses.http import exchange, request

pytestmark = pytest.mark.asyncio(loop_scope="module")
COMPLETIONS = "/v1/completions"

# What a gRPC request has, and the same of an HTTP one.
BAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sampling": {"temperature": -1}}, {"temperature": -1}),
    ({"sampling": {"temperature": 101}}, {"temperature": 101}),
    ({"sampling": {"top_p": 0}}, {"top_p": 0}),
    ({"sampling": {"top_p": 1.5}}, {"top_p": 1.5}),
    ({"sampling": {"min_p": 2}}, {"min_p": 2}),
    ({"sampling": {"typical_p": 0}}, {"typical_p": 0}),
    ({"sampling": {"repetition_penalty": 0}}, {"repetition_penalty": 0}),
    ({"sampling": {"presence_penalty": 101}}, {"presence_penalty": 101}),
    ({"sampling": {"frequency_penalty": -101}}, {"frequency_penalty": -101}),
    ({"sampling": {"logit_bias": {3: 2e4}}}, {"logit_bias": {"3": 2e4}}),
    (
        {"sampling": {"logit_bias": dict.fromkeys(range(1025), 1)}},
        {"logit_bias": dict.fromkeys(range(1025), 1)},
    ),
    ({"stopping": {"max_new_tokens": 0}}, {"max_tokens": 0}),
    ({"stopping": {"max_new_tokens": 2, "min_new_tokens": 3}}, {"max_tokens": 2, "min_tokens": 3}),
    ({"stopping": {"stop_sequences": [""]}}, {"stop": [""]}),
    ({"stopping": {"stop_sequences": ["a"] * 17}}, {"stop": ["a"] * 17}),
    ({"stopping": {"stop_sequences": ["a" * 257]}}, {"stop": "a" * 257}),
    ({"stopping": {"stop_token_ids": [1] * 257}}, {"stop_token_ids": [1] * 257}),
    ({"speculation": {"num_tokens": 17}}, {"speculation": {"num_tokens": 17}}),
    ({"num_sequences": 17}, {"n": 17}),
    ({"cache_salt": "a" * 257}, {"cache_salt": "a" * 257}),
    ({"request_id": "a" * 129}, {"request_id": "a" * 129}),
    ({"request_id": "a\nb"}, {"request_id": "a\nb"}),
    ({"task_id": "no-such"}, {"model": "no-such"}),
    ({"task_id": "no-such@3"}, {"model": "no-such@3"}),
    ({"task_id": "No Name"}, {"model": "No Name"}),
    ({"text": ""}, {"prompt": ""}),
    ({"text": "a" * (2**20 + 1)}, {"prompt": "a" * (2**20 + 1)}),
    ({"text": "a" * 2000}, {"prompt": "a" * 2000}),
    ({"token_ids": {"ids": [10**6]}}, {"prompt": [10**6]}),
    ({"json_schema": "{}" * 40_000}, {"guided_json": "{}" * 40_000}),
    ({"json_schema": '{"$ref": "http://a/b"}'}, {"guided_json": {"$ref": "http://a/b"}}),
    ({"regex": ""}, {"guided_regex": ""}),
    ({"choice": {"options": []}}, {"guided_choice": []}),
    ({"choice": {"options": ["a", ""]}}, {"structured_outputs": {"choice": ["a", ""]}}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Running]:
    async with running_server() as running:
        yield running


@pytest.mark.parametrize(("ours", "theirs"), BAD, ids=[str(theirs)[:40] for _, theirs in BAD])
async def test_a_fault_has_one_reason_and_one_field(
    server: Running, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    prompt = {} if ours.keys() & {"text", "token_ids"} else {"text": "a"}
    refusal = await refused(server.generation.Generate(pb.GenerateRequest(**prompt, **ours)))
    reply = await exchange(server.http, request(COMPLETIONS, {"prompt": "a", **theirs}))
    kind = KINDS[refusal.reason]
    assert (reply.status, reply.error["code"]) == (kind.status, kind.code or refusal.reason.lower())
    fields = {param_of(field) for field in refusal.fields} or {"model"}
    assert reply.error["param"] in {*fields, *(f"prompt{field.removeprefix('text')}" for field in fields)}


ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"sampling": {"temperature": 0}}, {"temperature": 0}),
    ({"sampling": {"seed": 5}}, {"seed": 5}),
    ({"sampling": {"temperature": 1.3, "top_k": 5, "seed": 5}}, {"temperature": 1.3, "top_k": 5, "seed": 5}),
    ({"sampling": {"top_p": 0.5, "min_p": 0.1, "seed": 2**64 - 1}}, {"top_p": 0.5, "min_p": 0.1, "seed": -1}),
    (
        {"sampling": {"presence_penalty": 2, "frequency_penalty": -1, "repetition_penalty": 1.2, "seed": 1}},
        {"presence_penalty": 2, "frequency_penalty": -1, "repetition_penalty": 1.2, "seed": 1},
    ),
    ({"sampling": {"logit_bias": {7: 100}, "seed": 1}}, {"logit_bias": {"7": 100}, "seed": 1}),
    ({"stopping": {"stop_sequences": ["e"]}}, {"stop": "e"}),
    (
        {"stopping": {"stop_token_ids": [*range(20, 60)], "ignore_eos": True}},
        {"stop_token_ids": [*range(20, 60)], "ignore_eos": True},
    ),
    ({"choice": {"options": ["one", "two"]}}, {"guided_choice": ["one", "two"]}),
    ({"speculation": {"num_tokens": 4}}, {"speculation": {"num_tokens": 4}}),
]
REASONS = {
    pb.FINISH_REASON_EOS: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = make_checkpoint(tmp_path_factory.mktemp("ports") / "model", seed=13)
    async with served_engine(load_tiny(directory)) as served:
        yield served


@pytest.mark.parametrize(("ours", "theirs"), ASKED, ids=[str(theirs)[:40] for _, theirs in ASKED])
async def test_a_request_has_one_answer(real: Served, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    stopping = {"max_new_tokens": 12, **ours.get("stopping", {})}
    message = pb.GenerateRequest(**{"text": "Once upon a time", **ours, "stopping": stopping})
    if "sampling" not in ours:
        theirs = {**theirs, "temperature": 0}
    body = {"prompt": "Once upon a time", "max_tokens": 12, "return_token_ids": True, **theirs}
    first = await real.generation.Generate(message)
    for salt in ("a", "b"):  # so that neither finds the other's prompt in the cache
        message.cache_salt = salt
        given = await real.generation.Generate(message)
        reply = await exchange(
            real.http, request(COMPLETIONS, {**body, "cache_salt": salt * 2}), timeout_s=60
        )
        (choice,) = reply.json["choices"]
        assert (
            choice["token_ids"]
            == [token.id for token in given.tokens]
            == [token.id for token in first.tokens]
        )
        assert (choice["text"], choice["finish_reason"]) == (given.text, REASONS[given.finish_reason])
        usage = reply.json["usage"]
        assert usage["prompt_tokens"] == given.usage.prompt_tokens
        assert usage["completion_tokens"] == given.usage.generated_tokens
        assert usage["prompt_tokens_details"]["cached_tokens"] == given.usage.cached_prompt_tokens


async def test_a_caller_that_leaves_frees_its_blocks(real: Served) -> None:
    host, _, port = real.http.rpartition(":")
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    for path in (COMPLETIONS, "/v1/chat/completions"):
        chat = {
            **{k: v for k, v in body.items() if k != "prompt"},
            "messages": [{"role": "user", "content": "a"}],
        }
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request(path, body if path == COMPLETIONS else chat))
        while not (await reader.readline()).startswith(b"data: "):
            pass
        assert real.engine.stats.kv_blocks_used > 0
        writer.close()
        await eventually(lambda: real.engine.stats.kv_blocks_used == 0, 2)
        assert real.engine.stats.num_running == 0
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request(COMPLETIONS, {**body, "stream": False}))
    await eventually(lambda: real.engine.stats.kv_blocks_used > 0, 5)
    writer.close()
    await eventually(lambda: real.engine.stats.kv_blocks_used == 0, 2)
    value = real.metrics.registry.get_sample_value
    labels = {"task": "_base", "method": "Completions", "code": "CANCELLED"}
    assert value("manyhats_requests_total", labels) == 2


async def test_pieces_of_a_stream_make_the_whole_answer(real: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 30, "seed": 3, "logprobs": 2, "n": 3, "return_token_ids": True}
    whole = (await exchange(real.http, request(COMPLETIONS, body), timeout_s=60)).json
    reply = await exchange(real.http, request(COMPLETIONS, {**body, "stream": True}), timeout_s=60)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = [line for line in reply.body.decode().split("\n\n") if line]
    assert done == "data: [DONE]"
    texts, ids = [""] * 3, [[] for _ in range(3)]  # type: ignore[var-annotated]
    logprobs: list[dict[str, list[Any]]] = [{} for _ in range(3)]
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
        ids[choice["index"]] += choice["token_ids"]
        for name, values in choice["logprobs"].items():
            logprobs[choice["index"]].setdefault(name, []).extend(values)
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ids == [choice["token_ids"] for choice in whole["choices"]]
    assert logprobs == [choice["logprobs"] for choice in whole["choices"]]
    assert len({tuple(each) for each in ids}) == 3
