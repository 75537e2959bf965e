"""What is not a number ends its own request with an error of its own, and nothing computed with it is used again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyhats.adapters.heads import HeadLayer, Pooling, TaskHead, TaskKind
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import NumericalError
from manyhats.engine.output import ScoreOutput, StepOutput
from manyhats.engine.request import EncodeRequest, ScoreRequest, SpeculationParams
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import (
    collect,
    digest_of,
    load_tiny,
    make_record,
    make_request,
    overflowing_lora,
    random_ids,
    random_lora,
    running_engine,
    until,
)
from support.harnesses.engine_loop import POISON, Loop, prompt, score_request


def cached_tokens(loop: Loop, name: str) -> int:
    output = loop.last(name)
    assert isinstance(output, StepOutput)
    return output.usage.cached_prompt_tokens


@pytest.mark.parametrize("position", [0, 3, 17, 39])
def test_a_prompt_that_fails_after_several_steps_leaves_nothing_of_any(loop: Loop, position: int) -> None:
    """Its first chunks want no logits, and are in the prefix cache by the time that its last row fails."""
    token_ids = prompt(1, 40)
    token_ids[position] = POISON
    loop.generate("bad", make_request(token_ids, new_tokens=4))
    loop.step()
    loop.step()
    assert len(loop.stats) + loop.steps.is_in_flight == 2
    loop.drain()
    assert isinstance(loop.error("bad"), NumericalError)
    assert loop.steps.scheduler.allocator.num_cached == 0


def test_what_a_task_has_cached_is_computed_afresh_and_others_keep_theirs(loop: Loop) -> None:
    first, second = (make_request(prompt(seed, 12), new_tokens=4) for seed in (1, 2))
    salted = make_request(prompt(3, 12), new_tokens=4, cache_salt="other")
    for name, request in (("a", first), ("b", second), ("c", salted)):
        loop.generate(name, request)
    loop.drain()
    loop.generate("bad", make_request([*prompt(1, 12), POISON], new_tokens=4))
    loop.drain()
    assert isinstance(loop.error("bad"), NumericalError)
    for name, request in (("a again", first), ("b again", second), ("c again", salted)):
        loop.generate(name, request)
    loop.drain()
    assert [cached_tokens(loop, f"{name} again") for name in "abc"] == [0, 0, 8]
    for name in "abc":
        assert loop.token_ids(f"{name} again") == loop.token_ids(name)
    loop.generate("a third", first)
    loop.drain()
    assert cached_tokens(loop, "a third") == 8, "the task may cache again"


def test_what_runs_on_the_same_blocks_goes_on_and_leaves_nothing(loop: Loop) -> None:
    shared = prompt(5, 12)
    loop.generate("first", make_request(shared, new_tokens=2))
    loop.drain()
    loop.generate("good", make_request([*shared, 7], new_tokens=9))
    loop.step()
    loop.generate("bad", make_request([*shared, POISON], new_tokens=9))
    loop.drain()
    assert isinstance(loop.error("bad"), NumericalError)
    assert loop.token_ids("good") == loop.decoder.greedy([*shared, 7], 9)
    assert loop.steps.scheduler.allocator.num_cached == 0


@pytest.mark.parametrize("at", ["prompt", "first continuation", "last continuation"])
def test_a_scoring_that_fails_leaves_nothing_of_its_prompt(loop: Loop, at: str) -> None:
    token_ids, continuations = prompt(1, 12), [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    bad_ids, bad_continuations = list(token_ids), [list(each) for each in continuations]
    if at == "prompt":
        bad_ids[5] = POISON
    else:
        bad_continuations[0 if at == "first continuation" else -1][0] = POISON
    loop.score("bad", score_request(bad_ids, bad_continuations))
    loop.generate("other", make_request(prompt(2), new_tokens=9, cache_salt="other"))
    loop.drain()
    assert isinstance(loop.error("bad"), NumericalError)
    assert loop.token_ids("other") == loop.decoder.greedy(prompt(2), 9)
    allocator = loop.steps.scheduler.allocator
    assert allocator.num_cached == 4, "the other's"
    loop.score("good", score_request(token_ids, continuations))
    loop.drain()
    assert isinstance(loop.last("good"), ScoreOutput)


def test_a_draft_that_is_not_finite_is_not_taken_and_one_that_is_taken_ends_its_answer(loop: Loop) -> None:
    """With drafts an answer ends where it would without, and its blocks are forgotten all the same."""
    loop.decoder.memory = 1
    finite = loop.decoder.logits
    loop.decoder.logits = lambda history: (  # type: ignore[method-assign]
        torch.full((TINY_VOCAB_SIZE,), torch.nan) if history.size >= 33 else finite(history)
    )
    token_ids = [5, 6, 7, 8] * 3
    counts = []
    for name, speculation in (("drafts", SpeculationParams(num_tokens=4)), ("none", SpeculationParams())):
        loop.generate(name, make_request(token_ids, new_tokens=60, speculation=speculation))
        loop.drain()
        assert isinstance(loop.error(name), NumericalError)
        assert loop.steps.scheduler.allocator.num_cached == 0
        counts.append(loop.token_ids(name))
    assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("non-finite") / "tiny", seed=8))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_one(values: torch.Tensor, value: float) -> torch.Tensor:
    values = values.clone()
    values.view(-1)[-1] = value
    return values


PREFIXES = {
    "stored": lambda bad: KVPrefix(normal(1, 2, 20, 2, 16), with_one(normal(2, 2, 20, 2, 16), bad), 0),
    "stored, full blocks": lambda bad: KVPrefix(
        normal(1, 2, 32, 2, 16), with_one(normal(2, 2, 32, 2, 16), bad), 0
    ),
    "soft": lambda bad: PromptEmbeddings(with_one(normal(3, 20, 64), bad)),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", PREFIXES)
async def test_virtual_tokens_that_are_not_finite_fail_their_requests_alone_and_are_not_kept(
    model: LoadedModel, kind: str, value: float
) -> None:
    """As if memory had gone bad: once the tokens are right again, requests are answered."""
    wrong, right = PREFIXES[kind](value), PREFIXES[kind](0.5)
    adapters = {
        "bad": LoweredAdapter(digest_of("bad"), (), wrong),
        "right": LoweredAdapter(digest_of("right"), (), right),
        "good": random_lora(model.description, 1),
    }
    others = [make_request(random_ids(1, 20, 300), make_record("good"), new_tokens=12)]
    others.append(make_request(random_ids(2, 20, 300), new_tokens=12))
    bad = [make_request(random_ids(seed, 20, 300), make_record("bad", digest_of("bad"))) for seed in (3, 4)]
    async with running_engine(model, adapters, max_num_batched_tokens=16) as engine:
        alone = [await collect(engine, request) for request in others]
        expected = await collect(
            engine, make_request(random_ids(3, 20, 300), make_record("right", digest_of("right")))
        )
        results = await asyncio.gather(
            *(collect(engine, request) for request in (bad[0], *others, bad[1])), return_exceptions=True
        )
        for result in (results[0], results[-1]):
            assert isinstance(result, NumericalError), result
        assert [result.tokens for result in results[1:-1]] == [answer.tokens for answer in alone]  # type: ignore[union-attr]
        await until(lambda: engine.stats.kv_blocks_used == held(engine, "right"))
        for part, good in zip(tensors_of(wrong), tensors_of(right), strict=True):
            part.copy_(good)
        assert (await collect(engine, bad[0])).tokens == expected.tokens


def tensors_of(prefix: Any) -> tuple[torch.Tensor, ...]:
    return (prefix.keys, prefix.values) if isinstance(prefix, KVPrefix) else (prefix.embeddings,)


def held(engine: Engine, task: str) -> int:
    """The blocks in which a task's virtual tokens are kept."""
    adapter = engine._residency._adapters[digest_of(task)]
    return len(adapter.virtual.held.block_ids) if adapter.virtual and adapter.virtual.held else 0


def head(weight: float) -> TaskHead:
    return TaskHead(TaskKind.CLASSIFY, Pooling.LAST, (HeadLayer(torch.full((3, 64), weight)),))


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("fault", ["deltas", "head"])
async def test_texts_that_are_read_fail_alone(tmp_path: Path, family: str, fault: str) -> None:
    make: Any = make_checkpoint if family == "llama" else make_encoder
    model = load_tiny(make(tmp_path / "model", family, seed=8))
    deltas = overflowing_lora(model.description).deltas if fault == "deltas" else ()
    bad_head = head(3e38 if fault == "head" else 0.1)
    adapters = {
        "bad": LoweredAdapter(digest_of("bad"), deltas, head=bad_head),
        "good": LoweredAdapter(digest_of("good"), random_lora(model.description, 1).deltas, head=head(0.1)),
    }
    texts = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (40, 9, 70))

    def read(engine: Engine, task: str) -> Any:
        asked = EncodeRequest(
            id=task, inputs=texts, adapter=make_record(task, digest_of(task)), applies_head=True
        )
        return engine.encode(asked)

    async with running_engine(model, adapters, max_num_batched_tokens=128) as engine:
        alone = await read(engine, "good")
        results = await asyncio.gather(
            *(read(engine, task) for task in ("bad", "good", "bad", "good")), return_exceptions=True
        )
        for result in results[::2]:
            assert isinstance(result, NumericalError), result
            assert ("head" in str(result)) == (fault == "head")
        for result in results[1::2]:
            assert not isinstance(result, BaseException)
            for found, expected in zip(result.values, alone.values, strict=True):
                assert np.array_equal(found, expected)
        await until(lambda: engine.stats.kv_blocks_used == 0)


async def test_scores_of_a_task_that_overflows_fail_and_leave_nothing(model: LoadedModel) -> None:
    adapters = {"bad": overflowing_lora(model.description)}
    async with running_engine(model, adapters) as engine:
        for continuations in (((7, 8),), ((7, 8), (9, 10), (11,))):
            request = ScoreRequest(
                id="s",
                prompt_token_ids=tuple(random_ids(1, 40, 300)),
                continuations=continuations,
                adapter=make_record("bad"),
            )
            with pytest.raises(NumericalError):
                await engine.score(request)
        await until(lambda: engine.stats.kv_blocks_used == 0)
        assert engine.stats.kv_blocks_cached == 0
