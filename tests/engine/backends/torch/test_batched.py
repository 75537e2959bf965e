"""All rows at once against the reference, which takes them one by one: every method, heads, dtypes, other sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from manyhats.adapters.primitives import HeadRows, HeadWeight, LoweredAdapter
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import ResponseOptions, SamplingParams
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import batched_backend
from support.harnesses.engine import (
    Answer,
    Prompt,
    Ran,
    Runner,
    collect,
    digest_of,
    load_tiny,
    make_request,
    overflowing_lora,
    random_ids,
    random_lora,
    running_engine,
)

TASKS = (*PLAIN, *COMPOSED)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["none", "nf4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("batched") / "tiny", seed=5), request.param)


@pytest.fixture(scope="module")
def store(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    directory = tmp_path_factory.mktemp("store")
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        register_every_method(store, directory / "sources", model.description, Sizes())
        yield store


async def answers(model: LoadedModel, store: AdapterStore, backend: Backend) -> list[Answer]:
    """Of every task and the base, in the same batches."""
    async with running_engine(
        model,
        store.lower,
        backend=backend,
        max_num_sequences=32,
        kv_cache_bytes=16 << 20,
        max_num_batched_tokens=100,
    ) as engine:
        requests = [
            make_request(
                random_ids(index, 5 + 3 * index, TINY_VOCAB_SIZE),
                store.resolve(task) if task else None,
                new_tokens=6,
                sampling=SamplingParams(temperature=0.8, top_p=0.9, seed=index) if index % 2 else None,
                response=ResponseOptions(logprobs=True, top_logprobs=2, prompt_logprobs=True),
            )
            for index, task in enumerate((*TASKS, ""))
        ]
        return await asyncio.gather(*(collect(engine, request) for request in requests))


def test_every_method_in_one_batch_is_as_the_reference_has_it(
    model: LoadedModel, store: AdapterStore
) -> None:
    backends = (batched_backend(), TorchBackend())
    ours, theirs = (asyncio.run(answers(model, store, backend)) for backend in backends)
    for task, found, expected in zip((*TASKS, ""), ours, theirs, strict=True):
        assert found.token_ids == expected.token_ids, task
        for one, other in zip(
            (*found.prompt_tokens, *found.tokens), (*expected.prompt_tokens, *expected.tokens), strict=True
        ):
            if one.logprob is None or other.logprob is None:
                assert one.logprob is other.logprob
            else:
                assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE), task


def heads(model: LoadedModel) -> dict[int, LoweredAdapter]:
    """A head's own weight, rows of it, and a vocabulary of another size with each."""
    generator = torch.Generator().manual_seed(2)
    width, vocab_size = model.architecture.read_size, model.architecture.vocab_size

    def rows(count: int) -> Tensor:
        return torch.randn(count, width, generator=generator) * width**-0.5

    added = torch.tensor([vocab_size + 1, 7, vocab_size])
    return {
        1: LoweredAdapter(digest_of("a"), (HeadWeight(rows(vocab_size)),)),
        2: LoweredAdapter(digest_of("b"), (HeadRows(torch.tensor([9, 3]), rows(2), torch.ones(2)),)),
        3: LoweredAdapter(digest_of("c"), (HeadRows(added, rows(3)),), vocab_size=vocab_size + 2),
        4: LoweredAdapter(digest_of("d"), (HeadWeight(rows(vocab_size - 9)),), vocab_size=vocab_size - 9),
    }


def prompts(num_slots: int) -> list[Prompt]:
    return [
        Prompt(random_ids(i, 1 + 13 * i % 45, TINY_VOCAB_SIZE), slot=i % num_slots, new_tokens=4, joins=i % 3)
        for i in range(8)
    ]


def assert_near(runs: list[Ran], others: list[Ran], tolerance: float) -> None:
    for ran, other in zip(runs, others, strict=True):
        distance = (ran.stacked - other.stacked).norm() / other.stacked.norm()
        assert distance < tolerance


def test_heads_of_tasks_are_as_the_reference_has_them(model: LoadedModel) -> None:
    adapters = {slot: replace(each, vocab_size=None) for slot, each in heads(model).items() if slot < 3}
    ours, theirs = (
        Runner(model, backend, adapters=adapters).run(prompts(3), max_tokens=24, all_logits=True)
        for backend in (batched_backend(), TorchBackend())
    )
    assert_near(ours, theirs, 1e-5)
    assert [ran.token_ids for ran in ours] == [ran.token_ids for ran in theirs]


@pytest.mark.parametrize("slot", [3, 4])
def test_vocabularies_of_tasks_are_as_the_reference_has_them(model: LoadedModel, slot: int) -> None:
    adapters = {slot: heads(model)[slot]}
    prompt = [Prompt(random_ids(i, 11, TINY_VOCAB_SIZE - 9), slot=slot, new_tokens=4) for i in range(2)]
    ours, theirs = (
        Runner(model, backend, adapters=adapters).run(prompt, all_logits=True)
        for backend in (batched_backend(), TorchBackend())
    )
    assert ours[0].stacked.shape[1] == adapters[slot].vocab_size
    assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_stay_near_the_reference(
    model: LoadedModel, dtype: str, cache_dtype: Literal["bfloat16", "int8"]
) -> None:
    adapters = {slot: random_lora(model.description, slot) for slot in (1, 2, 3)}
    ours, theirs = (
        Runner(model, backend, adapters=adapters, cache_dtype=cache_dtype, adapter_dtype="bfloat16").run(
            [replace(prompt, new_tokens=0) for prompt in prompts(4)], max_tokens=24, all_logits=True
        )
        for backend in (batched_backend(dtype), TorchBackend())
    )
    assert_near(ours, theirs, 0.05 if dtype == "bfloat16" else 2e-3)


def test_a_sequence_whose_numbers_overflow_spoils_no_other(model: LoadedModel) -> None:
    adapters = {1: overflowing_lora(model.description), 2: random_lora(model.description, 2)}
    asked = [Prompt(random_ids(i, 9 + i, TINY_VOCAB_SIZE), slot=i % 3, new_tokens=4) for i in range(6)]
    runner = Runner(model, batched_backend(), adapters=adapters)
    spoiled = runner.run(asked, all_logits=True)
    sound = Runner(model, batched_backend(), adapters={2: adapters[2]}).run(asked, all_logits=True)
    for prompt, ran, other in zip(asked, spoiled, sound, strict=True):
        if prompt.slot == 1:
            assert not torch.isfinite(ran.stacked).all()
        else:
            assert ran.token_ids == other.token_ids
            np.testing.assert_allclose(ran.stacked, other.stacked, atol=TOLERANCE)


def test_a_long_prompt_is_the_same_whole_as_in_chunks_of_any_size(model: LoadedModel) -> None:
    prompt = [Prompt(random_ids(1, 300, TINY_VOCAB_SIZE), new_tokens=3)]
    runner = Runner(model, batched_backend())
    whole = runner.run(prompt, all_logits=True)
    for size in (1, 7, 130):
        assert_near(runner.run(prompt, all_logits=True, max_tokens=size), whole, 1e-5)
