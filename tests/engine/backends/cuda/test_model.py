"""Whole models on the kernels: every family and method as the torch backend has them, and rows that keep their bits."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.adapters.primitives import HeadRows, HeadWeight, LoweredAdapter
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cuda.backend import CudaBackend
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import ResponseOptions, SamplingParams
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
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

LIMITS = Limits(max_rows=64, max_sequences=32, adapter_bytes=8 << 20, memory_fraction=0.9)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"tie": True},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "num_layers": 3},
    "phi3": {},
    "phi": {},
    "granite": {},
    "olmo2": {},
    "smollm3": {"num_layers": 3},
    "gpt2": {},
    "gptj": {},
    "gpt_neox": {},
    "opt": {},
    "falcon": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 4},
    "mixtral": {},
    "qwen3_moe": {"num_layers": 3, "mlp_only_layers": [1]},
}
TASKS = (*PLAIN, *COMPOSED)


def kernels(limits: Limits = LIMITS) -> Backend:
    return CudaBackend(DEVICE, limits)


def in_torch() -> Backend:
    """The same numbers, rounded in the same places, in plain torch."""
    return TorchBackend(DEVICE, "bfloat16", by_row=False)


def run(
    model: LoadedModel,
    backend: Backend,
    prompts: Sequence[Prompt],
    adapters: dict[int, LoweredAdapter],
    **options: Any,
) -> list[Ran]:
    runner = Runner(model, backend, adapters=adapters, cache_dtype="bfloat16", num_blocks=40)
    return runner.run(prompts, all_logits=True, **options)


def distance(ran: Ran, other: Ran, num_rows: int) -> float:
    """Of the logits of a prompt, relative."""
    own, its = ran.stacked[:num_rows], other.stacked[:num_rows]
    return float((own - its).norm() / its.norm())


def assert_as_good_as_torch(model: LoadedModel, prompts: Sequence[Prompt], **adapters: Any) -> None:
    """No further from exact arithmetic than plain torch in bfloat16; the same first tokens, but for near ties."""
    ours, torchs = (run(model, backend, prompts, **adapters) for backend in (kernels(), in_torch()))
    exact = run(model, TorchBackend(), prompts, **adapters)
    for prompt, our, its, right in zip(prompts, ours, torchs, exact, strict=True):
        count = len(prompt.token_ids)
        off = distance(our, right, count)
        assert off <= 1.5 * distance(its, right, count) + 1e-3
        last = right.logits[count - 1]
        assert last[our.token_ids[count]] >= last.max() - 2 * off * last.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_exact_as_plain_torch(family: str, tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "tiny", seed=5, **{"family": family, **FAMILIES[family]}))
    prompts = [
        Prompt(random_ids(i, (4, 1, 2)[i], TINY_VOCAB_SIZE), slot=i % 2, new_tokens=1) for i in range(3)
    ]
    assert_as_good_as_torch(model, prompts, adapters={1: random_lora(model.description, 1)})


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
        for i in range(4)
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
                random_ids(index, 2 + index % 3, TINY_VOCAB_SIZE),
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
