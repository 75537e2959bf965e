"""Virtual tokens in a pool that has no room for all of them: every request that fits alone ends, as it would alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.errors import EngineError
from manyhats.engine.loop import step as engine_module
from manyhats.engine.loop.private_run import PrivateRun
from manyhats.engine.request import ResponseOptions, ScoreRequest
from manyhats.engine.scheduling.scheduler import Scheduler
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import default_model
from support.harnesses.engine import (
    collect,
    digest_of,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
    until,
)

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4
"""Keys and values of 16 positions in the tiny model's two layers, two heads of 16 each, float32."""
POOL_BLOCKS = 12
SIZES = {"stored 100": 100, "stored 37": 37, "stored 7": 7, "soft 90": 90, "soft 33": 33, "deltas 48": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("virtual") / "tiny", seed=8))


def normal(seed: int, *shape: int, scale: float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def stored(name: str, count: int) -> LoweredAdapter:
    keys, values = (normal(count + i, 2, count, 2, 16, scale=1.0) for i in range(2))
    return LoweredAdapter(digest_of(name), (), KVPrefix(keys, values, 0))


def soft(name: str, count: int, base: LoadedModel | None = None) -> LoweredAdapter:
    deltas = () if base is None else random_lora(base.description, count).deltas
    return LoweredAdapter(digest_of(name), deltas, PromptEmbeddings(normal(count, count, 64, scale=0.3)))


def adapters(model: LoadedModel) -> dict[str, LoweredAdapter]:
    """Of each kind: stored keys and values, embeddings, and embeddings that run with deltas."""
    made = {}
    for name, count in SIZES.items():
        kind = name.split()[0]
        made[name] = (
            stored(name, count)
            if kind == "stored"
            else soft(name, count, model if kind == "deltas" else None)
        )
    return made


@dataclass(frozen=True)
class Row:
    """One request; with ``num_scored`` a scoring of so many continuations."""

    task: str
    num_prompt: int
    num_new: int
    seed: int
    num_scored: int = 0
    asks_prompt: bool = False


async def answer(engine: Engine, row: Row, salt: str = "") -> Any:
    """What the request comes to, to be compared bit by bit."""
    adapter = make_record(row.task, digest_of(row.task)) if row.task else None
    prompt = random_ids(row.seed, row.num_prompt, TINY_VOCAB_SIZE)
    if row.num_scored:
        continuations = (
            random_ids(row.seed + i, row.num_new, TINY_VOCAB_SIZE) for i in range(row.num_scored)
        )
        asked = ScoreRequest(
            id="score",
            prompt_token_ids=tuple(prompt),
            continuations=tuple(tuple(each) for each in continuations),
            adapter=adapter,
            response=ResponseOptions(logprobs=True),
            cache_salt=salt,
        )
        return (await engine.score(asked)).scores
    response = ResponseOptions(logprobs=True, prompt_logprobs=row.asks_prompt)
    request = make_request(prompt, adapter, new_tokens=row.num_new, response=response, cache_salt=salt)
    found = await collect(engine, request)
    return found.tokens, found.prompt_tokens


async def all_at_once(engine: Engine, rows: Sequence[Row]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*(answer(engine, row) for row in rows)), 120)


@pytest.mark.bits
@pytest.mark.parametrize("make", [stored, soft])
async def test_two_tasks_that_fit_alone_but_not_together_both_end(make: Any, model: LoadedModel) -> None:
    tasks = {"a": make("a", 100), "b": make("b", 101)}
    rows = [
        Row("a", 20, 30, 1),
        Row("b", 20, 30, 2),
        Row("", 5, 3, 3),
        Row("a", 9, 40, 4),
        Row("b", 50, 9, 5),
    ]
    async with running_engine(model, tasks) as roomy:
        alone = [await answer(roomy, row) for row in rows]
    async with running_engine(model, tasks, kv_cache_bytes=POOL_BLOCKS * BLOCK_BYTES) as engine:
        for task in tasks:
            await engine.warm_adapter(make_record(task, digest_of(task)))
        assert engine.stats.kv_blocks_used == 0, "a loaded task keeps nothing in the pool"
        assert await all_at_once(engine, rows) == alone
        assert engine.silent_s < 1


async def test_what_waits_keeps_nothing_in_the_pool_and_lets_pass_what_fits(model: LoadedModel) -> None:
    tasks = {"a": stored("a", 100), "b": soft("b", 101)}
    async with running_engine(model, tasks, kv_cache_bytes=POOL_BLOCKS * BLOCK_BYTES) as engine:
        running = engine.generate(make_request([5] * 60, new_tokens=100))
        await anext(running)
        waiting = [asyncio.create_task(answer(engine, Row(task, 40, 4, 1))) for task in tasks]
        await until(lambda: engine.stats.num_waiting == 2)
        assert engine.stats.kv_blocks_used <= 10, "those of the one that runs"
        await asyncio.wait_for(answer(engine, Row("", 3, 2, 2)), 20)
        await running.aclose()
        assert len([await asyncio.wait_for(each, 20) for each in waiting]) == 2


async def test_requests_of_a_task_share_its_virtual_tokens_once_they_are_in_place(model: LoadedModel) -> None:
    tasks = {"stored": stored("stored", 100), "soft": soft("soft", 100)}
    async with running_engine(model, tasks) as engine:
        prefilled: list[int] = []
        engine.loop.on_step = lambda stats: prefilled.append(stats.num_prefill_tokens)
        for task, first in (("stored", 10), ("soft", 110)):
            prefilled.clear()
            await all_at_once(engine, [Row(task, 10, 3, seed) for seed in range(4)])
            assert sum(prefilled) == first + 3 * 10
            prefilled.clear()
            await answer(engine, Row(task, 10, 3, 9))
            assert sum(prefilled) == 10


@pytest.mark.parametrize("fails", ["step_plan", "forward"])
async def test_a_step_that_fails_leaves_no_virtual_tokens_that_are_not_there(
    fails: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("broken")

    row = Row("stored", 10, 3, 1)
    async with running_engine(model, {"stored": stored("stored", 100)}) as engine:
        where: Any = engine_module if fails == "step_plan" else default_model()
        monkeypatch.setattr(where, fails, broken)
        with pytest.raises(EngineError):
            await answer(engine, row)
        after = await answer(engine, row)
    async with running_engine(model, {"stored": stored("stored", 100)}) as fresh:
        assert after == await answer(fresh, row)


async def test_virtual_tokens_do_not_count_as_cached_prompt_tokens(model: LoadedModel) -> None:
    tasks = {"stored": stored("stored", 100), "soft": soft("soft", 100)}
    async with running_engine(model, tasks) as engine:
        for task in tasks:
            record = make_record(task, digest_of(task))
            prompt = random_ids(1, 40, TINY_VOCAB_SIZE)
            first, again = [await collect(engine, make_request(prompt, record)) for _ in range(2)]
            assert first.usage.cached_prompt_tokens == 0
            assert again.usage.cached_prompt_tokens == 28, "144 tokens fill whole blocks, but for the 140th's"


@pytest.mark.bits
def test_every_mix_of_requests_ends_with_the_tokens_that_each_has_alone(model: LoadedModel) -> None:
    tasks = adapters(model)
    alone: dict[Row, Any] = {}

    async def run(rows: Sequence[Row], config: Mapping[str, int], gaps: Sequence[int]) -> None:
        async with running_engine(model, tasks) as roomy:
            for row in rows:
                if row not in alone:
                    alone[row] = await answer(roomy, row, salt=str(len(alone)))
        async with running_engine(model, tasks, **config) as engine:
            asked = []
            for row, gap in zip(rows, gaps, strict=True):
                asked.append(asyncio.create_task(answer(engine, row)))
                await asyncio.sleep(gap / 1000)
            for row, found in zip(rows, await asyncio.wait_for(asyncio.gather(*asked), 120), strict=True):
                assert found == alone[row], row

    rows = st.builds(
        Row,
        task=st.sampled_from(["", *tasks]),
        num_prompt=st.integers(1, 40),
        num_new=st.integers(1, 20),
        seed=st.integers(0, 5),
        num_scored=st.sampled_from([0, 0, 0, 1, 3]),
        asks_prompt=st.booleans(),
    )

    @settings(max_examples=20, deadline=None)
    @given(
        st.lists(st.tuples(rows, st.sampled_from([0, 0, 1, 10])), min_size=2, max_size=14),
        st.integers(10, 24),
        st.sampled_from([8, 40, 256]),
        st.sampled_from([2, 8]),
    )
    def check(arrivals: list[tuple[Row, int]], num_blocks: int, num_tokens: int, num_sequences: int) -> None:
        config = {
            "kv_cache_bytes": num_blocks * BLOCK_BYTES,
            "max_num_batched_tokens": num_tokens,
            "max_num_sequences": num_sequences,
        }
        asyncio.run(run([row for row, _ in arrivals], config, [gap for _, gap in arrivals]))

    check()


class _NeverDone(PrivateRun):
    """A job that nothing moves."""

    def next(self, scheduler: Scheduler, now_s: float) -> None:
        """Queues nothing."""


async def test_a_standstill_is_told_and_ends_when_something_gets_on(model: LoadedModel) -> None:
    async with running_engine(model) as engine:
        engine.loop.submit(lambda: engine.loop.step.add(_NeverDone("never", (1,))))
        await until(lambda: engine.silent_s > 1)
        await answer(engine, Row("", 5, 4, 1))
        await until(lambda: engine.silent_s < 1)
        await until(lambda: engine.silent_s > 1)
        engine.loop.submit(lambda: engine.loop.step.cancel("never")[:0])  # nobody hears of it
        await until(lambda: engine.silent_s < 1)
        await asyncio.sleep(1.5)
        assert engine.silent_s < 1
