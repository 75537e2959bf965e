from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import torch

from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.output import StepStats
from manyhats.engine.request import Request, ResponseOptions, SamplingParams
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import (
    Answer,
    Prompt,
    Runner,
    collect,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
    until,
)

NUM_ADAPTERS = 10
NUM_REQUESTS = 10
POPULATIONS: dict[str, Callable[[int], int]] = {
    "base only": lambda index: 0,
    "identical": lambda index: 4,
    "distinct": lambda index: index,
    "skewed": lambda index: 2 if index % 3 else index % 5,
}


@pytest.fixture(scope="module", params=["none", "nf4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = make_checkpoint(tmp_path_factory.mktemp("mixed") / "model", seed=11)
    return load_tiny(directory, request.param)


@pytest.fixture(scope="module")
def runner(model: LoadedModel) -> Runner:
    ranks = (1, 2, 3, 4, 8, 16, 33, 5, 64, 7)
    adapters = {
        slot: random_lora(model.description, slot, rank=ranks[slot % len(ranks)])
        for slot in range(1, NUM_ADAPTERS + 1)
    }
    return Runner(model, adapters=adapters)


def prompts_of(population: str) -> list[Prompt]:
    return [
        Prompt(
            random_ids(index, 1 + (13 * index) % 45, TINY_VOCAB_SIZE),
            slot=POPULATIONS[population](index),
            new_tokens=4 + index % 5,
            joins=(7 * index) % 6,
        )
        for index in range(NUM_REQUESTS)
    ]


@pytest.mark.bits
@pytest.mark.parametrize("population", POPULATIONS)
def test_each_sequence_has_the_bits_it_has_alone_while_others_join_and_leave(
    runner: Runner, population: str
) -> None:
    prompts = prompts_of(population)
    mixed = runner.run(prompts, max_tokens=24, all_logits=True)
    for prompt, ran in zip(prompts, mixed, strict=True):
        alone = runner.run([prompt], all_logits=True)[0]
        assert alone.token_ids == ran.token_ids
        assert torch.equal(alone.stacked, ran.stacked)


def test_two_threads_give_the_same_bits(model: LoadedModel, runner: Runner) -> None:
    adapters = {slot: random_lora(model.description, slot) for slot in (1, 2)}
    prompts = [Prompt(random_ids(i, 20, TINY_VOCAB_SIZE), slot=i % 3, new_tokens=3) for i in range(5)]
    one, two = (
        Runner(model, CpuBackend(count), adapters=adapters).run(prompts, all_logits=True) for count in (1, 2)
    )
    for ran, other in zip(one, two, strict=True):
        assert torch.equal(ran.stacked, other.stacked)


def test_adapters_change_what_is_said(runner: Runner) -> None:
    prompt = random_ids(1, 12, TINY_VOCAB_SIZE)
    runs = runner.run([Prompt(prompt, slot=slot, new_tokens=8) for slot in range(NUM_ADAPTERS)])
    assert len({tuple(ran.token_ids) for ran in runs}) == NUM_ADAPTERS


def requests_of(population: str) -> list[Request]:
    """Greedy and seeded requests, with log-probabilities, so that any changed logit shows."""
    requests = []
    for index, prompt in enumerate(prompts_of(population)):
        sampling = SamplingParams(temperature=0.8, top_k=50, seed=index) if index % 3 == 0 else None
        requests.append(
            make_request(
                prompt.token_ids,
                make_record(f"task-{prompt.slot}") if prompt.slot else None,
                new_tokens=6 + index,
                sampling=sampling,
                response=ResponseOptions(logprobs=True, top_logprobs=3, prompt_logprobs=index % 4 == 0),
            )
        )
    return requests


def said(answer: Answer) -> tuple[object, ...]:
    return answer.tokens, answer.prompt_tokens, answer.text, answer.finish_reason


async def joined_one_by_one(engine: Engine, requests: list[Request]) -> list[Answer]:
    tasks = []
    for request in requests:
        tasks.append(asyncio.create_task(collect(engine, request)))
        await asyncio.sleep(0.004)
    return await asyncio.gather(*tasks)


@pytest.mark.bits
@pytest.mark.parametrize("population", POPULATIONS)
async def test_through_the_engine_each_request_gets_what_it_gets_alone(
    model: LoadedModel, population: str
) -> None:
    adapters = {f"task-{slot}": random_lora(model.description, slot) for slot in range(1, NUM_ADAPTERS + 1)}
    requests = requests_of(population)
    steps: list[StepStats] = []

    def note(stats: StepStats) -> None:
        steps.append(stats)
        time.sleep(0.005)  # else a request would be over before the next one comes

    async with running_engine(model, adapters, max_num_batched_tokens=32) as engine:
        engine.loop.on_step = note
        together = await joined_one_by_one(engine, requests)
        engine.loop.on_step = steps.append
        alone = [await collect(engine, request) for request in requests]
        await until(lambda: engine.stats.kv_blocks_used == 0)
    async with running_engine(model, adapters) as fresh:
        alone_and_cold = [await collect(fresh, request) for request in requests]
    assert max(stats.num_decode_tokens for stats in steps) > 1, "nothing ran together"
    for answer, other, cold in zip(together, alone, alone_and_cold, strict=True):
        assert said(answer) == said(other) == said(cold)
