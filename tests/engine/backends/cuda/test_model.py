"""Whole models on the kernels: every method as the torch backend has it, and rows that keep their bits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from manyhats.adapters.primitives import HeadRows, HeadWeight, LoweredAdapter
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.backends.backend import Backend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import ResponseOptions, SamplingParams
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.gpu.models import assert_as_good_as_torch, distance, in_torch, kernels, run
from support.harnesses.engine import (
    Answer,
    Prompt,
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(make_checkpoint(tmp_path_factory.mktemp("cuda") / "tiny", seed=5), "nf4")


def test_nf4_linears_are_as_exact_as_plain_torch(model: LoadedModel) -> None:
    prompts = [Prompt(random_ids(i, 4 + i, TINY_VOCAB_SIZE), slot=i, new_tokens=2) for i in range(3)]
    adapters = {slot: random_lora(model.description, slot) for slot in (1, 2)}
    assert_as_good_as_torch(model, prompts, adapters=adapters)


def test_a_row_has_the_same_bits_alone_and_in_any_company(model: LoadedModel) -> None:
    adapters = {slot: random_lora(model.description, slot) for slot in (1, 2)}
    prompts = [
        Prompt(random_ids(i, 3 + 4 * i, TINY_VOCAB_SIZE), slot=i % 3, new_tokens=2, joins=i % 2)
        for i in range(3)
    ]
    together = run(model, kernels(), prompts, adapters)
    in_chunks = run(model, kernels(), prompts, adapters, max_tokens=5)
    alone = [run(model, kernels(), [prompt], {}, max_tokens=64)[0] for prompt in prompts if not prompt.slot]
    for ran, other in zip(together, in_chunks, strict=True):
        assert ran.token_ids == other.token_ids
        assert torch.equal(ran.stacked, other.stacked)
    bases = [ran for ran, prompt in zip(together, prompts, strict=True) if not prompt.slot]
    for ran, other in zip(alone, bases, strict=True):
        assert torch.equal(ran.stacked, other.stacked)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_sequence_whose_numbers_overflow_spoils_no_other(model: LoadedModel) -> None:
    adapters = {1: overflowing_lora(model.description)}
    prompts = [Prompt(random_ids(i, 3 + i, TINY_VOCAB_SIZE), slot=i % 2, new_tokens=1) for i in range(3)]
    spoiled = run(model, kernels(), prompts, adapters)
    sound = run(model, kernels(), prompts, {})
    for prompt, ran, other in zip(prompts, spoiled, sound, strict=True):
        if prompt.slot:
            assert not torch.isfinite(ran.stacked).all()
        else:
            assert torch.equal(ran.stacked, other.stacked)


@pytest.mark.parametrize("kind", ["rows", "weight"])
def test_a_task_with_its_own_vocabulary_is_as_plain_torch_has_it(model: LoadedModel, kind: str) -> None:
    generator, width = torch.Generator().manual_seed(2), model.architecture.read_size

    def rows(count: int) -> torch.Tensor:
        return torch.randn(count, width, generator=generator) * width**-0.5

    size = TINY_VOCAB_SIZE
    if kind == "rows":
        head = HeadRows(torch.tensor([size + 1, 7, size]), rows(3), torch.ones(3))
        task = LoweredAdapter(digest_of(kind), (head,), vocab_size=size + 2)
    else:
        task = LoweredAdapter(digest_of(kind), (HeadWeight(rows(size - 9)),), vocab_size=size - 9)
    prompts = [Prompt(random_ids(i, 3, size - 9), slot=3, new_tokens=1) for i in range(2)]
    ours, torchs = (run(model, backend, prompts, {3: task}) for backend in (kernels(), in_torch()))
    for ran, other in zip(ours, torchs, strict=True):
        assert ran.stacked.shape[1] == task.vocab_size
        assert distance(ran, other, 3) < 0.02


@pytest.fixture(scope="module")
def store(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    directory = tmp_path_factory.mktemp("store")
    with closing(open_store(directory / "store", model.description, [directory])) as store:
        register_every_method(store, directory / "sources", model.description, Sizes())
        yield store


async def answers(model: LoadedModel, store: AdapterStore, backend: Backend) -> list[Answer]:
    """Of every task and the base, in the same batches."""
    async with running_engine(
        model, store.lower, backend=backend, dtype="bfloat16", max_num_sequences=32, max_num_batched_tokens=64
    ) as engine:
        requests = [
            make_request(
                random_ids(index, 1 + index % 2, TINY_VOCAB_SIZE),
                store.resolve(task) if task else None,
                new_tokens=2,
                sampling=SamplingParams(temperature=0.8, top_p=0.9, seed=index) if index % 2 else None,
                response=ResponseOptions(logprobs=True, prompt_logprobs=True),
            )
            for index, task in enumerate((*TASKS, ""))
        ]
        return await asyncio.gather(*(collect(engine, request) for request in requests))


def test_every_method_in_one_batch_is_as_plain_torch_has_it(model: LoadedModel, store: AdapterStore) -> None:
    ours, torchs = (asyncio.run(answers(model, store, backend)) for backend in (kernels(), in_torch()))
    for task, found, expected in zip((*TASKS, ""), ours, torchs, strict=True):
        pairs = zip(
            (*found.prompt_tokens, *found.tokens), (*expected.prompt_tokens, *expected.tokens), strict=True
        )
        for one, other in pairs:
            if one.id != other.id:
                break  # a near tie: what follows is another text
            if one.logprob is not None and other.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=0.15), task
