"""Several answers to one prompt: computed once, seeded in a row, ended and counted together."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import grpc
import pytest

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import EngineConfig
from manyhats.engine.errors import NumericalError
from manyhats.v1 import generation_pb2 as pb
from support.factories.tiny_models import make_checkpoint
from support.fakes.server import eventually, refused, running_server
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import served_engine

BLOCK_SIZE = EngineConfig().block_size
PROMPT = [3 + (7 * index) % 60 for index in range(3 * BLOCK_SIZE + 5)]


def asked(num_sequences: int | None, *, seed: int | None = 5, num_tokens: int = 12) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(temperature=1.5, seed=seed),
        stopping=pb.StoppingParams(max_new_tokens=num_tokens, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=True),
        num_sequences=num_sequences,
    )


def ids(tokens: object) -> list[int]:
    return [token.id for token in tokens]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("several") / "model", seed=13))


async def test_each_answer_is_that_of_its_seed_and_the_prompt_is_computed_once(model: LoadedModel) -> None:
    async with served_engine(model) as served:
        first = await served.generation.Generate(asked(4))
        alone = [await served.generation.Generate(asked(None, seed=5 + index)) for index in range(4)]
        again = [piece async for piece in served.generation.GenerateStream(asked(4))]
    whole = [first, *first.more_sequences]
    assert [ids(each.tokens) for each in whole] == [ids(each.tokens) for each in alone]
    assert [each.text for each in whole] == [each.text for each in alone]
    assert len({tuple(ids(each.tokens)) for each in whole}) == 4
    assert first.usage.cached_prompt_tokens == 0
    assert [each.usage.cached_prompt_tokens for each in first.more_sequences] == [3 * BLOCK_SIZE] * 3
    by_index = defaultdict(list)
    for piece in again:
        by_index[piece.sequence_index].append(piece)
    for index, each in enumerate(whole):
        pieces = by_index[index]
        assert [token for piece in pieces for token in piece.tokens] == list(each.tokens)
        assert [piece.finish_reason for piece in pieces].count(pb.FINISH_REASON_LENGTH) == 1
        assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert pieces[-1].usage.generated_tokens == 12


async def test_the_largest_seed_is_followed_by_the_smallest() -> None:
    async with running_server() as server:
        await server.generation.Generate(asked(2, seed=2**64 - 1))
        await server.generation.Generate(asked(2, seed=None))
    assert [request.sampling.seed for request in server.engine.requests] == [2**64 - 1, 0, None, None]
    assert len({request.id for request in server.engine.requests}) == 4


async def test_only_the_first_tells_of_the_prompt_and_it_is_counted_once() -> None:
    request = pb.GenerateRequest(
        text="hats", num_sequences=3, response=pb.ResponseOptions(prompt_logprobs=True)
    )
    async with running_server() as server:
        answer = await server.generation.Generate(request)
        wants = [each.response.prompt_logprobs for each in server.engine.requests]
        registry = server.metrics.registry
        counted = {
            name: registry.get_sample_value(f"manyhats_{name}", {"task": "_base"})
            for name in ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count")
        }
    assert wants == [True, False, False]
    assert len(answer.prompt_tokens) == 5
    assert counted == {
        "prompt_tokens_total": 5.0,
        "generated_tokens_total": 15.0,
        "time_to_first_token_seconds_count": 1.0,
    }


@pytest.mark.parametrize("number", [0, 17, 2**32 - 1])
async def test_a_number_out_of_range(number: int) -> None:
    async with running_server() as server:
        for refusal in (
            await refused(server.generation.Generate(asked(number))),
            await refused(anext(aiter(server.generation.GenerateStream(asked(number))))),
        ):
            assert refusal.reason == "FIELD_INVALID"
            assert f"num_sequences: must be in [1, 16], not {number}" in refusal.message
    assert not server.engine.requests


async def test_an_error_of_one_ends_all() -> None:
    async with running_server() as server:
        server.engine.error, server.engine.error_after = NumericalError("nan"), 2
        refusal = await refused(server.generation.Generate(asked(3)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "NUMERICAL_ERROR")
        await eventually(lambda: server.engine.running == 0)
    assert len(server.engine.closed) == 3


async def test_a_caller_that_leaves_ends_all() -> None:
    async with running_server() as server:
        server.engine.step_s = 0.01
        stream = server.generation.GenerateStream(asked(3, num_tokens=50))
        await anext(aiter(stream))
        await eventually(lambda: server.engine.running == 3)
        stream.cancel()
        await eventually(lambda: server.engine.running == 0)
        await asyncio.sleep(0)
    assert len(server.engine.closed) == 3
