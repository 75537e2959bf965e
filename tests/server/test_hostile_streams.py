"""Callers that do not read, and ids that are no token, over a real port to a real engine."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.output import StepOutput
from manyhats.v1 import generation_pb2 as pb
from support.factories.tiny_models import EOS_TOKEN_ID, make_checkpoint
from support.fakes.server import refusal_of, refused
from support.harnesses.engine import load_tiny, until
from support.harnesses.engine_server import Served, served_engine

V = 320
NUM_UNREAD = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("streams") / "model", seed=13))


def long_request(seed: int, num_tokens: int = 400) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[seed + 5, 7, 9]),
        stopping=pb.StoppingParams(max_new_tokens=num_tokens, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=True, top_logprobs=100),
    )


def num_outputs_alive() -> int:
    gc.collect()
    return sum(type(each) is StepOutput for each in gc.get_objects())


async def all_pause(server: Served) -> None:
    await until(lambda: server.engine.loop.step.has_work and server.engine.loop.step.is_idle)


async def test_streams_nobody_reads_hold_little_while_others_go_on_and_lose_nothing(
    model: LoadedModel,
) -> None:
    async with served_engine(model, max_unread_outputs=16) as server:
        whole = [await server.generation.Generate(long_request(seed)) for seed in range(NUM_UNREAD)]
        before = num_outputs_alive()
        calls = [server.generation.GenerateStream(long_request(seed)) for seed in range(NUM_UNREAD)]
        streams = [aiter(call) for call in calls]
        firsts = [await anext(stream) for stream in streams]
        await all_pause(server)
        assert num_outputs_alive() - before <= NUM_UNREAD * 20
        assert server.engine.stats.kv_blocks_used == 0
        other = await server.generation.Generate(long_request(9))
        assert len(other.tokens) == 400
        for call, stream, first, answer in zip(calls, streams, firsts, whole, strict=True):
            pieces = [first, *[piece async for piece in stream]]
            assert [token for piece in pieces for token in piece.tokens] == list(answer.tokens)
            assert "".join(piece.text for piece in pieces) == answer.text
            *before_last, last = [piece.finish_reason for piece in pieces]
            assert set(before_last) == {pb.FINISH_REASON_UNSPECIFIED}
            assert last == pb.FINISH_REASON_LENGTH
            assert await call.code() is grpc.StatusCode.OK


async def test_a_stream_unread_for_too_long_ends_with_a_status_behind_what_was_sent(
    model: LoadedModel,
) -> None:
    async with served_engine(model, max_unread_outputs=8, unread_limit_s=0.3) as server:
        whole = await server.generation.Generate(long_request(1))
        stream = aiter(server.generation.GenerateStream(long_request(1)))
        pieces = [await anext(stream)]
        await all_pause(server)
        await until(lambda: not server.engine.loop.step.has_work)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(stream, pieces)
        refusal = refusal_of(caught.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_UNREAD")
        assert "0.3 s" in refusal.message
        tokens = [token for piece in pieces for token in piece.tokens]
        assert 0 < len(tokens) < 400
        assert tokens == list(whole.tokens)[: len(tokens)]


async def read_all(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for piece in stream:
        into.append(piece)


async def test_a_deadline_or_a_caller_that_leaves_ends_a_paused_stream(model: LoadedModel) -> None:
    async with served_engine(model, max_unread_outputs=8) as server:
        leaving = server.generation.GenerateStream(long_request(1))
        late = server.generation.GenerateStream(long_request(2), timeout=3.0)
        streams = [aiter(leaving), aiter(late)]
        for stream in streams:
            await anext(stream)
        await all_pause(server)
        leaving.cancel()
        await until(lambda: not server.engine.loop.step.has_work)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(streams[1], [])
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(("length", "num_top"), [(1, 0), (2, 100), (40, 3), (130, 1), (300, 100)])
async def test_a_long_answer_built_in_pieces_has_every_token(
    model: LoadedModel, length: int, num_top: int
) -> None:
    ids = [5 + (7 * i) % 300 for i in range(length)]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        stopping=pb.StoppingParams(max_new_tokens=5, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=True, top_logprobs=num_top, prompt_logprobs=True),
    )
    async with served_engine(model, max_num_sequences=8) as server:
        whole = await server.generation.Generate(request)
        pieces = [piece async for piece in server.generation.GenerateStream(request)]
        scored = await server.generation.Score(
            pb.ScoreRequest(
                token_ids=pb.TokenIds(ids=ids[:1]),
                continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=ids[1:] or [7]))] * 2,
            )
        )
    assert [token.id for token in whole.prompt_tokens] == ids
    assert [len(token.top) for token in whole.prompt_tokens] == [0] + [num_top] * (length - 1)
    assert len(whole.tokens) == 5
    assert list(pieces[0].prompt_tokens) == list(whole.prompt_tokens)
    assert [token for piece in pieces for token in piece.tokens] == list(whole.tokens)
    for score in scored.scores:
        assert [token.id for token in score.tokens] == (ids[1:] or [7])
        if length > 1:
            found = [(token.logprob, token.rank) for token in whole.prompt_tokens[1:]]
            assert [(token.logprob, token.rank) for token in score.tokens] == found


WRONG_IDS = [V, V + 1, 2**31 - 1, 2**31, 2**32 - 1]


@pytest.mark.parametrize("wrong", WRONG_IDS)
async def test_ids_that_are_no_token_are_refused_by_field_and_the_server_goes_on(
    model: LoadedModel, wrong: int
) -> None:
    def asking(**fields: object) -> pb.GenerateRequest:
        return pb.GenerateRequest(text="a", **fields)  # type: ignore[arg-type]

    ids = pb.TokenIds(ids=[5, wrong])
    async with served_engine(model) as server:
        generate, score = server.generation.Generate, server.generation.Score
        calls = {
            "token_ids.ids": generate(pb.GenerateRequest(token_ids=ids)),
            "stopping.stop_token_ids": generate(asking(stopping={"stop_token_ids": [3, wrong]})),
            "sampling.logit_bias": generate(asking(sampling={"logit_bias": {wrong: 1.0}})),
            "continuations[0].token_ids.ids": score(
                pb.ScoreRequest(text="a", continuations=[pb.Continuation(token_ids=ids)])
            ),
        }
        for field, call in calls.items():
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
            assert refusal.fields == (field,)
            assert str(V) in refusal.message
        refusal = await refused(server.generation.Tokenize(pb.TokenizeRequest(token_ids=ids)))
        assert refusal.fields == ("token_ids.ids",)
        assert len((await generate(asking(stopping={"max_new_tokens": 3, "ignore_eos": True}))).tokens) == 3


async def test_a_request_that_forbids_every_token_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    size = 128
    directory = make_checkpoint(tmp_path_factory.mktemp("small") / "model", vocab_size=size)
    stop = [token for token in range(size) if token != EOS_TOKEN_ID]
    async with served_engine(load_tiny(directory)) as server:
        for min_new_tokens in (1, 5):
            stopping = pb.StoppingParams(min_new_tokens=min_new_tokens, stop_token_ids=stop)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), stopping=stopping)
            refusal = await refused(server.generation.Generate(request))
            assert refusal.fields == ("stopping.min_new_tokens",)
        stopping = pb.StoppingParams(stop_token_ids=stop)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), stopping=stopping)
        assert len((await server.generation.Generate(request)).tokens) == 1
