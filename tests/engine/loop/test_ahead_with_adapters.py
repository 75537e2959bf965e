"""An engine that runs one step ahead: nothing that a step in flight names is changed, whoever comes and goes meanwhile.

Each ``running_engine`` on an ``AheadBackend`` checks that at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.request import ResponseOptions, SamplingParams, ScoreRequest, StoppingParams
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.fakes.ahead import AheadBackend
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

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4
"""Keys and values of 16 positions in the tiny model's two layers, two heads of 16 each, float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("ahead") / "tiny", seed=8))


@pytest.fixture(scope="module")
def tasks(model: LoadedModel) -> dict[str, LoweredAdapter]:
    loras = {f"lora {seed}": random_lora(model.description, seed) for seed in range(4)}
    stored = LoweredAdapter(digest_of("stored"), (), KVPrefix(*(normal(i, 2, 37, 2, 16) for i in (1, 2)), 0))
    soft = LoweredAdapter(digest_of("soft"), loras["lora 1"].deltas, PromptEmbeddings(normal(3, 33, 64)))
    return {**loras, "stored": stored, "soft": soft, "bad": overflowing_lora(model.description)}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ahead(seed: int = 0) -> Any:
    return AheadBackend(TorchBackend(by_row=True), seed)


@dataclass(frozen=True)
class Row:
    """One request: a scoring, or an answer that may stop early, and that its caller may leave after some outputs."""

    task: str
    num_prompt: int
    num_new: int
    seed: int
    scores: bool = False
    leaves_after: int | None = None


def stops_of(seed: int) -> tuple[int, ...]:
    return tuple(range(seed, TINY_VOCAB_SIZE, 9))


async def answer(engine: Engine, row: Row, salt: str = "") -> Any:
    adapter = make_record(row.task, digest_of(row.task)) if row.task else None
    prompt = random_ids(row.seed, row.num_prompt, TINY_VOCAB_SIZE)
    if row.scores:
        continuations = tuple(tuple(random_ids(each, row.num_new, TINY_VOCAB_SIZE)) for each in range(3))
        asked = ScoreRequest(
            id="s",
            prompt_token_ids=tuple(prompt),
            continuations=continuations,
            adapter=adapter,
            cache_salt=salt,
        )
        return (await engine.score(asked)).scores
    request = make_request(
        prompt,
        adapter,
        sampling=SamplingParams(temperature=0.8, seed=row.seed),
        stopping=StoppingParams(
            max_new_tokens=row.num_new, ignore_eos=True, stop_token_ids=stops_of(row.seed)
        ),
        response=ResponseOptions(logprobs=True, prompt_logprobs=row.seed % 2 == 0),
        cache_salt=salt,
    )
    if row.leaves_after is None:
        found = await collect(engine, request)
        return found.tokens, found.prompt_tokens, found.finish_reason
    async with contextlib.aclosing(engine.generate(request)) as outputs:
        count = 0
        async for _ in outputs:
            count += 1
            if count == row.leaves_after:
                break
    return None


rows_of = st.builds(
    Row,
    task=st.sampled_from(["", "lora 0", "lora 1", "lora 2", "lora 3", "stored", "soft"]),
    num_prompt=st.integers(1, 40),
    num_new=st.integers(1, 16),
    seed=st.integers(0, 5),
    scores=st.sampled_from([False, False, False, True]),
    leaves_after=st.sampled_from([None, None, None, 1, 4]),
)


def test_every_mix_of_requests_ends_with_what_each_comes_to_alone(
    model: LoadedModel, tasks: Mapping[str, LoweredAdapter]
) -> None:
    alone: dict[Row, Any] = {}

    async def run(rows: Sequence[Row], gaps: Sequence[int], seed: int, config: Mapping[str, int]) -> None:
        async with running_engine(model, tasks, backend=TorchBackend(by_row=True)) as plain:
            for row in rows:
                if row not in alone:
                    alone[row] = await answer(plain, row, salt=str(len(alone)))
        async with running_engine(model, tasks, backend=ahead(seed), **config) as engine:
            asked = []
            for row, gap in zip(rows, gaps, strict=True):
                asked.append(asyncio.create_task(answer(engine, row)))
                await asyncio.sleep(gap / 1000)
            for row, found in zip(rows, await asyncio.wait_for(asyncio.gather(*asked), 120), strict=True):
                assert found == alone[row], row
            await until(lambda: not engine.loop.step.has_work)

    @settings(max_examples=30, deadline=None)
    @given(
        arrivals=st.lists(st.tuples(rows_of, st.sampled_from([0, 0, 1, 10])), min_size=2, max_size=10),
        seed=st.integers(0, 999),
        num_blocks=st.integers(8, 24),
        num_tokens=st.sampled_from([8, 40]),
        num_slots=st.integers(1, 3),
    )
    def check(
        arrivals: list[tuple[Row, int]], seed: int, num_blocks: int, num_tokens: int, num_slots: int
    ) -> None:
        config = {
            "kv_cache_bytes": num_blocks * BLOCK_BYTES,
            "max_num_batched_tokens": num_tokens,
            "max_loaded_adapters": num_slots,
        }
        asyncio.run(run([row for row, _ in arrivals], [gap for _, gap in arrivals], seed, config))

    check()


async def test_adapters_that_are_forgotten_as_their_answers_end_leave_their_slots_afterwards(
    model: LoadedModel, tasks: Mapping[str, LoweredAdapter]
) -> None:
    """Answers end with a stop token, so that a step with a row of each is in flight as the last output goes out."""
    backend = ahead(1)
    async with running_engine(model, tasks, backend=backend, max_loaded_adapters=2) as engine:
        beside = engine.generate(make_request([5] * 9, new_tokens=400))
        await anext(beside)
        for turn in range(24):
            task = f"lora {turn % 4}"
            answered = asyncio.create_task(answer(engine, Row(task, 6, 12, turn % 6)))
            await asyncio.sleep(0)
            engine.forget_adapter(digest_of(task))
            await answered
            engine.forget_adapter(digest_of(task))
        await beside.aclose()
    assert backend.device.most_in_flight == 2


async def test_probes_run_beside_streams(model: LoadedModel, tasks: Mapping[str, LoweredAdapter]) -> None:
    async with running_engine(model, tasks, backend=TorchBackend(by_row=True)) as plain:
        expected = [plain.probe(tasks[task]) for task in ("lora 1", "stored", "soft")]
    async with running_engine(model, tasks, backend=ahead(2), max_num_batched_tokens=8) as engine:
        beside = engine.generate(make_request([5] * 9, new_tokens=400))
        await anext(beside)
        for _ in range(2):
            found = [
                await asyncio.to_thread(engine.probe, tasks[task]) for task in ("lora 1", "stored", "soft")
            ]
            assert found == expected
            with pytest.raises(Exception, match="not finite"):
                await asyncio.to_thread(engine.probe, tasks["bad"])
        await beside.aclose()


async def test_an_engine_that_is_stopped_waits_for_what_is_in_flight(
    model: LoadedModel, tasks: Mapping[str, LoweredAdapter]
) -> None:
    backend = ahead(3)
    async with running_engine(model, tasks, backend=backend) as engine:
        running = asyncio.create_task(collect(engine, make_request([5] * 9, new_tokens=400)))
        await until(lambda: backend.device.most_in_flight == 2)
        await engine.stop(drain_s=0)
        with pytest.raises(Exception, match="ended"):
            await running
    assert not backend.device.launched
