"""Every method in one batch, from artifact directories to tokens: each row gets what it gets alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.output import StepStats
from manyhats.engine.request import ResponseOptions, SpeculationParams
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Answer, collect, load_tiny, make_request, random_ids, running_engine
from support.oracles.peft import read

NUM_ROWS = 32
TASKS = (*PLAIN, *COMPOSED)
BASE = ""
Row = tuple[str, tuple[int, ...], int]
"""Task, or the base; prompt; number of new tokens."""


@pytest.fixture(scope="module", params=["none", "nf4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = make_checkpoint(tmp_path_factory.mktemp("every") / "tiny", seed=5)
    return load_tiny(directory, request.param)


@pytest.fixture(scope="module")
def store(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    directory = tmp_path_factory.mktemp("store")
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        register_every_method(store, directory / "sources", model.description, Sizes())
        yield store


def rows_of(order: Sequence[int], seed: int = 0, new_tokens: tuple[int, int] = (3, 8)) -> list[Row]:
    """Every task, the rest the base; in an order, with prompts of 1 to 47 tokens, some of them the same."""
    tasks = [*TASKS, *[BASE] * (NUM_ROWS - len(TASKS))]
    source = random.Random(seed)
    shared = random_ids(seed, 40, TINY_VOCAB_SIZE)
    rows = []
    for index in order:
        own = random_ids(1000 * seed + index, source.randint(1, 30), TINY_VOCAB_SIZE)
        prompt = shared + own[:7] if source.random() < 0.4 else own
        rows.append((tasks[index], tuple(prompt), source.randint(*new_tokens)))
    return rows


@asynccontextmanager
async def engine_of(model: LoadedModel, store: AdapterStore, **config: int) -> AsyncIterator[Engine]:
    settings = {"max_num_sequences": NUM_ROWS, "kv_cache_bytes": 16 << 20, **config}
    async with running_engine(model, store.lower, **settings) as engine:
        yield engine


async def answer(
    engine: Engine, store: AdapterStore, row: Row, salt: str = "", num_drafts: int = 0
) -> Answer:
    task, prompt, new_tokens = row
    request = make_request(
        prompt,
        store.resolve(task) if task else None,
        new_tokens=new_tokens,
        response=ResponseOptions(logprobs=True, top_logprobs=2),
        speculation=SpeculationParams(num_tokens=num_drafts),
        cache_salt=salt,
    )
    return await collect(engine, request)


async def all_at_once(
    engine: Engine, store: AdapterStore, rows: Sequence[Row], num_drafts: int = 0
) -> list[Answer]:
    return await asyncio.gather(*(answer(engine, store, row, num_drafts=num_drafts) for row in rows))


def test_the_tasks_are_of_every_method_there_is(store: AdapterStore) -> None:
    assert len(TASKS) < NUM_ROWS
    of_encoders = {AdapterMethod.REFT}
    assert {store.resolve(task).method for task in TASKS} == set(AdapterMethod) - of_encoders


@pytest.mark.bits
async def test_rows_over_all_methods_in_one_batch_are_each_as_alone(
    model: LoadedModel, store: AdapterStore
) -> None:
    rows = rows_of(range(NUM_ROWS), new_tokens=(16, 24))
    steps: list[StepStats] = []
    async with engine_of(model, store) as engine:
        for task in TASKS:
            await engine.warm_adapter(store.resolve(task))
        engine.loop.on_step = steps.append
        together = await all_at_once(engine, store, rows)
    assert max(step.num_decode_tokens for step in steps) == NUM_ROWS
    async with engine_of(model, store, block_size=32, max_num_batched_tokens=32) as fresh:
        alone = [await answer(fresh, store, row, salt=str(index)) for index, row in enumerate(rows)]
    for row, mixed, single in zip(rows, together, alone, strict=True):
        assert mixed.tokens == single.tokens, row[0]


@pytest.mark.bits
async def test_guesses_change_no_bit_of_any_method(model: LoadedModel, store: AdapterStore) -> None:
    rows = rows_of(range(NUM_ROWS), seed=2, new_tokens=(20, 30))
    async with engine_of(model, store, max_num_batched_tokens=400) as engine:
        scheduler = engine.loop.step.scheduler
        scheduler.config = replace(scheduler.config, max_draft_rows=400)  # as many as there are
        guessed = await all_at_once(engine, store, rows, num_drafts=16)
    async with engine_of(model, store) as fresh:
        plain = await all_at_once(fresh, store, rows)
    for row, answer_with, answer_without in zip(rows, guessed, plain, strict=True):
        assert answer_with.tokens == answer_without.tokens, row[0]
    accepted = sum(answer_with.usage.accepted_draft_tokens for answer_with in guessed)
    assert 5 < accepted < sum(answer_with.usage.draft_tokens for answer_with in guessed)


@pytest.mark.parametrize("task", PLAIN)
def test_an_artifact_is_the_same_bits_wherever_in_memory_it_is_read_to(
    task: str, model: LoadedModel, tmp_path: Path
) -> None:
    """Matrix products of float32 may differ by alignment; after an eviction, tokens may not."""
    artifact = read(PLAIN[task][1](tmp_path, model.description, Sizes(rank=6)), model.description)
    loaded = [
        tensors_of(lower(replace(artifact, tensors=shifted(artifact.tensors, offset)), model.description))
        for offset in range(0, 17, 3)
    ]
    for tensors in loaded:
        for tensor, first in zip(tensors, loaded[0], strict=True):
            assert torch.equal(tensor, first)


def shifted(tensors: Mapping[str, torch.Tensor], offset: int) -> dict[str, torch.Tensor]:
    """Copies that begin so many elements after an aligned address."""
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape)
        copies[name].copy_(tensor)
    return copies


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors of a lowered adapter, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


async def test_every_task_says_something_else(model: LoadedModel, store: AdapterStore) -> None:
    prompt = tuple(random_ids(3, 11, TINY_VOCAB_SIZE))
    async with engine_of(model, store) as engine:
        answers = await all_at_once(engine, store, [(task, prompt, 8) for task in (BASE, *TASKS)])
    assert len({tuple(token.logprob for token in each.tokens) for each in answers}) == 1 + len(TASKS)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Row], dict[str, int]]:
    order = draw(st.permutations(range(NUM_ROWS)))
    config = {
        "block_size": draw(st.sampled_from([16, 32, 48])),
        "max_num_batched_tokens": draw(st.sampled_from([NUM_ROWS, 50, 300])),
        "max_num_sequences": draw(st.sampled_from([5, NUM_ROWS])),
    }
    return rows_of(order, seed=draw(st.integers(0, 3))), config


@pytest.mark.bits
def test_order_block_size_and_chunks_do_not_count(model: LoadedModel, store: AdapterStore) -> None:
    alone: dict[Row, Answer] = {}

    async def run(rows: Sequence[Row], config: Mapping[str, int]) -> None:
        async with engine_of(model, store, **config) as engine:
            together = await all_at_once(engine, store, rows)
            for index, row in enumerate(rows):
                if row not in alone:
                    alone[row] = await answer(engine, store, row, salt=str(index))
        for row, mixed in zip(rows, together, strict=True):
            assert mixed.tokens == alone[row].tokens, row[0]

    # Inside, so that a falsifying example is told without the model's weights.
    @settings(max_examples=12, deadline=None)
    @given(mixture=mixtures())
    def check(mixture: tuple[list[Row], dict[str, int]]) -> None:
        asyncio.run(run(*mixture))

    check()


@pytest.mark.bits
def test_ranks_and_numbers_of_virtual_tokens_do_not_count(
    model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def run(store: AdapterStore, rows: Sequence[Row]) -> None:
        async with engine_of(model, store, max_num_batched_tokens=64) as engine:
            together = await all_at_once(engine, store, rows)
            for index, (row, mixed) in enumerate(zip(rows, together, strict=True)):
                assert (await answer(engine, store, row, salt=str(index))).tokens == mixed.tokens, row[0]

    @settings(max_examples=6, deadline=None)
    @given(
        st.builds(
            Sizes,
            rank=st.integers(1, 9),
            num_virtual_tokens=st.integers(1, 35),
            seed=st.integers(0, 1000),
        )
    )
    def check(sizes: Sizes) -> None:
        directory = tmp_path_factory.mktemp("sizes")
        with closing(open_store(directory / "store", model.description, [directory])) as store:
            records = register_every_method(store, directory / "sources", model.description, sizes)
            assert len({record.digest for record in records.values()}) == len(TASKS)
            asyncio.run(run(store, rows_of(range(NUM_ROWS), seed=sizes.seed)))

    check()
