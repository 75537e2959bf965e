from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.output import ScoreOutput, StepStats
from manyhats.engine.request import ResponseOptions, ScoreRequest
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import (
    collect,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
    until,
)
from support.oracles.transformers import continuation_logprob, full_logits, load_transformers, next_logprobs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scoring") / "model", seed=17)


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_tiny(directory)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> nn.Module:
    return load_transformers(directory)


def request_of(num_prompt: int, lengths: list[int], **fields: object) -> ScoreRequest:
    return ScoreRequest(
        id="score",
        prompt_token_ids=tuple(random_ids(num_prompt, num_prompt, TINY_VOCAB_SIZE)),
        continuations=tuple(
            tuple(random_ids(1000 + index, length, TINY_VOCAB_SIZE)) for index, length in enumerate(lengths)
        ),
        **fields,  # type: ignore[arg-type]
    )


def assert_scores(output: ScoreOutput, request: ScoreRequest, oracle: nn.Module) -> None:
    assert len(output.scores) == len(request.continuations)
    for score, continuation in zip(output.scores, request.continuations, strict=True):
        assert tuple(token.id for token in score.tokens) == continuation
        assert score.logprob == pytest.approx(
            continuation_logprob(oracle, request.prompt_token_ids, continuation), abs=1e-3
        )
        assert score.logprob == pytest.approx(sum(token.logprob or 0.0 for token in score.tokens))


@pytest.mark.bits
@pytest.mark.parametrize("num_prompt", [1, 2, 15, 16, 17, 32, 33, 75])
@pytest.mark.parametrize("lengths", [[1], [20], [1, 1], [3, 40], [7, 1, 16, 17]])
async def test_a_score_is_the_sum_of_each_token_s_logprob_by_full_recomputation(
    num_prompt: int, lengths: list[int], model: LoadedModel, oracle: nn.Module
) -> None:
    request = request_of(num_prompt, lengths)
    async with running_engine(model, max_num_batched_tokens=24) as engine:
        output = await engine.score(request)
        assert_scores(output, request, oracle)
        again = await engine.score(request)  # with the prompt in the prefix cache
        assert again.scores == output.scores
        await until(lambda: engine.stats.kv_blocks_used == 0)


async def test_seventy_continuations_share_one_prompt(model: LoadedModel, oracle: nn.Module) -> None:
    request = request_of(45, [1 + index % 6 for index in range(70)])
    computed = 0

    def count(stats: object) -> None:
        nonlocal computed
        computed += stats.num_prefill_tokens  # type: ignore[attr-defined]

    async with running_engine(model) as engine:
        engine.loop.on_step = count
        output = await engine.score(request)
        await until(lambda: engine.stats.kv_blocks_used == 0)
    assert_scores(output, request, oracle)
    assert computed == 45 + sum(len(continuation) - 1 for continuation in request.continuations)
    assert output.usage.prompt_tokens == 45


async def test_given_tokens_of_a_continuation_are_computed_and_not_scored(
    model: LoadedModel, oracle: nn.Module
) -> None:
    request = request_of(20, [3, 5, 1, 4])
    given = (0, 2, 0, 3)
    async with running_engine(model) as engine:
        output = await engine.score(replace(request, num_given=given))
    for score, continuation, num_given in zip(output.scores, request.continuations, given, strict=True):
        prompt, scored = request.prompt_token_ids + continuation[:num_given], continuation[num_given:]
        assert tuple(token.id for token in score.tokens) == scored
        assert score.logprob == pytest.approx(continuation_logprob(oracle, prompt, scored), abs=1e-3)


@pytest.mark.parametrize("given", [(0,), (0, 2, 0), (0, 5), (-1, 0), (3, 0)])
async def test_given_tokens_leave_one_to_score_in_each_continuation(
    given: tuple[int, ...], model: LoadedModel
) -> None:
    async with running_engine(model) as engine:
        with pytest.raises(FieldInvalidError, match="num_given"):
            await engine.score(replace(request_of(4, [3, 5]), num_given=given))


@pytest.mark.bits
async def test_a_pool_too_small_for_all_continuations_gives_the_same_scores(
    model: LoadedModel,
) -> None:
    request = request_of(40, [30] * 6)
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4
    async with running_engine(model) as engine:
        expected = await engine.score(request)
    async with running_engine(model, kv_cache_bytes=9 * block_bytes) as engine:
        mixed, answer = await asyncio.gather(
            engine.score(request),
            collect(engine, make_request(random_ids(1, 30, TINY_VOCAB_SIZE), new_tokens=60)),
        )
        await until(lambda: engine.stats.kv_blocks_used == 0)
    assert mixed.scores == expected.scores
    assert len(answer.tokens) == 60


async def test_top_tokens_and_ranks(model: LoadedModel, oracle: nn.Module) -> None:
    request = request_of(9, [4, 2], response=ResponseOptions(logprobs=True, top_logprobs=3))
    async with running_engine(model) as engine:
        output = await engine.score(request)
    for score, continuation in zip(output.scores, request.continuations, strict=True):
        whole = [*request.prompt_token_ids, *continuation]
        logits = full_logits(oracle, whole)
        expected = next_logprobs(logits, whole)[8:]
        found = torch.tensor([token.logprob for token in score.tokens]).double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for token, row in zip(score.tokens, logits[8:-1], strict=True):
            assert [top.id for top in token.top] == row.topk(3).indices.tolist()
            assert token.rank == int((row > row[token.id]).sum()) + 1


@pytest.mark.bits
async def test_scores_of_an_adapter_equal_its_prompt_logprobs_beside_other_requests(
    model: LoadedModel,
) -> None:
    adapters = {"a": random_lora(model.description, 1)}
    request = request_of(20, [5, 9], adapter=make_record("a"))
    async with running_engine(model, adapters) as engine:
        output, *_ = await asyncio.gather(
            engine.score(request),
            engine.score(request_of(20, [5, 9])),
            collect(engine, make_request(request.prompt_token_ids, new_tokens=12)),
        )
        for score, continuation in zip(output.scores, request.continuations, strict=True):
            options = ResponseOptions(prompt_logprobs=True)
            whole = (*request.prompt_token_ids, *continuation)
            answer = await collect(
                engine, make_request(whole, make_record("a"), new_tokens=1, response=options)
            )
            assert [token.logprob for token in score.tokens] == [
                token.logprob for token in answer.prompt_tokens[20:]
            ]


async def test_a_scoring_of_too_many_tokens_is_refused_by_field_count_and_limit(model: LoadedModel) -> None:
    async with running_engine(model, max_score_tokens=100) as engine:
        fits = request_of(40, [20, 40])
        assert len((await engine.score(fits)).scores) == 2
        for num_prompt, lengths in ((41, [20, 40]), (100, [1]), (1, [1] * 100), (40, [30, 31])):
            total = num_prompt + sum(lengths)
            with pytest.raises(
                FieldInvalidError, match=f"continuations: have {total} tokens .* limit is 100"
            ):
                await engine.score(request_of(num_prompt, lengths))


async def test_requests_have_their_turn_while_a_large_scoring_goes_on_and_it_ends(
    model: LoadedModel, oracle: nn.Module
) -> None:
    large = request_of(60, [400] * 12)
    config = {"max_num_batched_tokens": 64, "max_num_sequences": 4, "max_bulk_tokens": 8}
    async with running_engine(model, **config) as engine:
        steps: list[StepStats] = []
        engine.loop.on_step = steps.append
        scoring = asyncio.create_task(engine.score(large))
        await until(lambda: len(steps) > 10)
        for seed in range(10):
            accepted_s, before = time.monotonic(), len(steps)
            request = make_request(random_ids(seed, 20, TINY_VOCAB_SIZE), new_tokens=1, accepted_s=accepted_s)
            await collect(engine, request)
            assert len(steps) - before < 10, "a step or two, and those that pass while threads change"
        assert not scoring.done()
        stream = engine.generate(make_request(random_ids(1, 20, TINY_VOCAB_SIZE), new_tokens=40))
        await anext(stream)
        first = len(steps)
        async for _ in stream:
            pass
        beside = [step.num_prefill_tokens for step in steps[first : first + 30] if step.num_decode_tokens]
        assert beside
        assert max(beside) <= 8 + 1
        assert_scores(await asyncio.wait_for(scoring, 120), large, oracle)
        assert max(step.num_prefill_tokens for step in steps) == 64, "alone it has all tokens of a step"


@pytest.mark.parametrize("lengths", [[2] * 300, [1, 200] * 5, [33, 2, 100, 7] * 6])
async def test_scores_and_tokens_beside_each_other_are_those_of_each_alone(
    lengths: list[int], model: LoadedModel
) -> None:
    large = request_of(50, lengths)
    others = [
        make_request(random_ids(seed, 5 + 40 * seed, TINY_VOCAB_SIZE), new_tokens=12) for seed in range(5)
    ]
    small = request_of(20, [3, 5])
    async with running_engine(model, max_num_batched_tokens=300) as engine:
        alone = (await engine.score(large), await engine.score(small))
        tokens = [(await collect(engine, request)).tokens for request in others]
    config = {"max_num_batched_tokens": 24, "max_num_sequences": 6, "max_bulk_tokens": 5, "max_waiting": 20}
    async with running_engine(model, **config) as engine:
        scorings = [asyncio.create_task(engine.score(request)) for request in (large, small)]
        answers = await asyncio.wait_for(asyncio.gather(*(collect(engine, each) for each in others)), 120)
        assert [answer.tokens for answer in answers] == tokens
        for scoring, expected in zip(scorings, alone, strict=True):
            assert (await asyncio.wait_for(scoring, 120)).scores == expected.scores
