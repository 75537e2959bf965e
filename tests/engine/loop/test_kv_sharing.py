"""Which KV blocks are shared: those of one adapter's bytes alone, whatever the task is called."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from itertools import combinations
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import AdapterInUseError
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.scheduling.schedule import Schedule
from support.factories.adapters import make_lora
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import (
    Answer,
    collect,
    load_tiny,
    make_request,
    random_ids,
    running_engine,
    until,
)

PROMPT = random_ids(7, 70, TINY_VOCAB_SIZE)
NUM_CACHED = 64
"""Of the prompt's tokens, those in full blocks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("sharing") / "tiny", seed=6))


@pytest.fixture
def store(model: LoadedModel, tmp_path: Path) -> Iterator[AdapterStore]:
    with closing(open_store(tmp_path / "store", model.description, [tmp_path])) as store:
        yield store


@pytest.fixture
def records(model: LoadedModel, store: AdapterStore, tmp_path: Path) -> dict[str, AdapterRecord]:
    return register_every_method(store, tmp_path / "sources", model.description, Sizes())


@asynccontextmanager
async def engine_of(model: LoadedModel, store: AdapterStore) -> AsyncIterator[Engine]:
    async with running_engine(model, store.lower, max_num_sequences=64, kv_cache_bytes=32 << 20) as engine:
        yield engine


async def ask(engine: Engine, record: AdapterRecord | None, salt: str = "", new_tokens: int = 4) -> Answer:
    return await collect(engine, make_request(PROMPT, record, new_tokens=new_tokens, cache_salt=salt))


def watch_blocks(engine: Engine) -> list[dict[bytes, list[set[int]]]]:
    """Step by step, the blocks of each sequence that runs, by the key of its adapter."""
    steps: list[dict[bytes, list[set[int]]]] = []
    scheduler = engine.loop.step.scheduler
    schedule = scheduler.schedule

    def watched() -> Schedule:
        result = schedule()
        by_key: dict[bytes, list[set[int]]] = defaultdict(list)
        for chunk in result.chunks:
            by_key[chunk.sequence.cache_key].append(set(chunk.sequence.block_table))
        steps.append(by_key)
        return result

    scheduler.schedule = watched  # type: ignore[method-assign]
    return steps


async def test_tasks_that_share_a_prompt_find_nothing_of_each_other(
    model: LoadedModel, store: AdapterStore, records: Mapping[str, AdapterRecord]
) -> None:
    tasks = [None, *records.values()]
    async with engine_of(model, store) as engine:
        first = [await ask(engine, record) for record in tasks]
        again = [await ask(engine, record) for record in tasks]
    assert [answer.usage.cached_prompt_tokens for answer in first] == [0] * len(tasks)
    for task, one, other in zip(tasks, first, again, strict=True):
        assert other.usage.cached_prompt_tokens >= NUM_CACHED - 16, task
        assert one.tokens == other.tokens
    async with engine_of(model, store) as fresh:
        for record, answer in zip(tasks, first, strict=True):
            assert (await ask(fresh, record, salt="fresh")).tokens == answer.tokens


async def test_no_block_is_ever_in_the_tables_of_two_adapters(
    model: LoadedModel, store: AdapterStore, records: Mapping[str, AdapterRecord]
) -> None:
    async with engine_of(model, store) as engine:
        tasks = [None, *records.values()]
        for record in tasks:
            await ask(engine, record)
        steps = watch_blocks(engine)
        await asyncio.gather(*(ask(engine, record, new_tokens=40) for record in tasks for _ in range(2)))
    most = max(steps, key=len)
    assert len(most) == 1 + len(PLAIN) + len(COMPOSED)
    for by_key in steps:
        for (_, one), (_, other) in combinations(by_key.items(), 2):
            assert not set[int]().union(*one) & set[int]().union(*other)
    shared = [set.intersection(*tables) for tables in most.values() if len(tables) == 2]
    assert shared
    assert all(shared), "two requests of one task share its blocks"


async def test_other_bytes_under_the_same_task_find_nothing_of_those_before(
    model: LoadedModel, store: AdapterStore, tmp_path: Path
) -> None:
    """Also while requests of the version before still run, and after a step back to it."""
    sources = [make_lora(tmp_path / f"v{seed}", model.description, rank=4, seed=seed) for seed in range(2)]
    async with engine_of(model, store) as engine:
        old = store.register(Registration("task", Uri(str(sources[0])))).record
        before = await ask(engine, store.resolve("task"))
        running = asyncio.create_task(ask(engine, store.resolve("task")))
        new = store.register(Registration("task", Uri(str(sources[1])))).record
        after = await ask(engine, store.resolve("task"))
        again = await ask(engine, store.resolve("task"))
        assert (await running).tokens == before.tokens
        assert (old.task_id, old.version, new.version) == (new.task_id, 1, 2)
        assert after.usage.cached_prompt_tokens == 0
        assert again.usage.cached_prompt_tokens == NUM_CACHED
        assert after.tokens == again.tokens
        assert after.token_ids != before.token_ids
        store.activate("task@1")
        back = await ask(engine, store.resolve("task"))
        assert back.tokens == before.tokens
    async with engine_of(model, store) as fresh:
        assert (await ask(fresh, store.resolve("task@2"))).tokens == after.tokens


async def test_a_deleted_task_s_name_finds_nothing_of_what_it_meant(
    model: LoadedModel, store: AdapterStore, tmp_path: Path
) -> None:
    sources = [make_lora(tmp_path / f"v{seed}", model.description, rank=4, seed=seed) for seed in range(2)]
    async with engine_of(model, store) as engine:
        store.register(Registration("task", Uri(str(sources[0]))))
        before = await ask(engine, store.resolve("task"))
        (removed,) = store.delete("task", in_use=engine.in_use)
        engine.forget_adapter(removed.digest)
        store.register(Registration("task", Uri(str(sources[1]))))
        after = await ask(engine, store.resolve("task"))
        assert after.usage.cached_prompt_tokens == 0
        assert after.token_ids != before.token_ids


async def test_a_task_is_deleted_while_another_of_the_same_bytes_is_in_use(
    model: LoadedModel, store: AdapterStore, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "source", model.description, rank=4)
    one, other = (store.register(Registration(task, Uri(str(source)))).record for task in ("one", "other"))
    async with engine_of(model, store) as engine:
        expected = await ask(engine, one, new_tokens=60)
        running = engine.generate(make_request(PROMPT, one, new_tokens=60))
        first = await anext(running)
        with pytest.raises(AdapterInUseError):
            store.delete("one", in_use=engine.in_use)
        assert store.delete("other", in_use=engine.in_use) == (other,)
        assert store.has_digest(one.digest)
        rest = [output async for output in running]
        tokens = [token for output in (first, *rest) for token in output.tokens]
        assert tokens == list(expected.tokens)
        assert (await ask(engine, one, new_tokens=60)).tokens == expected.tokens
        await until(lambda: not engine.in_use(one))
        assert len(store.lower(one).deltas) > 0, "the bytes are there as long as a version has them"
        assert store.delete("one", in_use=engine.in_use) == (one,)


async def test_tasks_of_the_same_bytes_share_blocks_and_a_salt_keeps_them_apart(
    model: LoadedModel, store: AdapterStore, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "source", model.description, rank=4)
    one, other = (store.register(Registration(task, Uri(str(source)))).record for task in ("one", "other"))
    async with engine_of(model, store) as engine:
        first = await ask(engine, one)
        second = await ask(engine, other)
        salted = await ask(engine, other, salt="mine")
    assert (first.usage.cached_prompt_tokens, second.usage.cached_prompt_tokens) == (0, NUM_CACHED)
    assert salted.usage.cached_prompt_tokens == 0
    assert first.tokens == second.tokens == salted.tokens
