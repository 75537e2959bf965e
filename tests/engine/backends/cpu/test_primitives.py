"""Every primitive through the engine: as the oracle says, and the same in any batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    KVPrefix,
    LayerNorm,
    LoweredAdapter,
    LowRank,
    PromptEmbeddings,
)
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cpu.adapters import bottleneck as bottleneck_kernels
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.request import ResponseOptions, ScoreRequest
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import (
    Prompt,
    Runner,
    collect,
    digest_of,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
)
from support.harnesses.kernels import from_python, put
from support.oracles.primitives import logits_with
from support.oracles.transformers import load_transformers

HIDDEN, VOCAB_TOLERANCE = 64, 2e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_checkpoint(tmp_path_factory.mktemp("primitives") / "tiny", "qwen2", seed=3, tie=True)


@pytest.fixture(scope="module")
def model(checkpoint: Any) -> LoadedModel:
    return load_tiny(checkpoint)


def normal(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def affine(model: LoadedModel) -> list[Delta]:
    out = model.description.linears
    return [
        Affine(Site(layer, name), 1 + normal(layer, out[name][1]), normal(7 + layer, out[name][1]))
        for layer, name in ((0, "k_proj"), (1, "v_proj"), (1, "down_proj"))
    ]


def input_scale(model: LoadedModel) -> list[Delta]:
    linears = model.description.linears
    return [
        InputScale(Site(0, "down_proj"), 1 + normal(1, linears["down_proj"][0])),
        InputScale(Site(1, "up_proj"), 1 + normal(2, HIDDEN)),
    ]


def bottleneck(model: LoadedModel) -> list[Delta]:
    def one(layer: int, sublayer: str, read: BottleneckInput, size: int, **settings: Any) -> Bottleneck:
        seed = 10 * layer + size
        return Bottleneck(
            site=Site(layer, sublayer),
            input=read,
            down=normal(seed, size, HIDDEN),
            down_bias=normal(seed + 1, size),
            up=normal(seed + 2, HIDDEN, size),
            up_bias=normal(seed + 3, HIDDEN),
            **{"activation": "silu", "scale": torch.tensor([1.5]), **settings},
        )

    norm = LayerNorm(1 + normal(5, HIDDEN), normal(6, HIDDEN))
    return [
        one(0, "attention", BottleneckInput.OUTPUT, 9, norm_before=norm),
        one(0, "feed_forward", BottleneckInput.SUM, 4, activation="gelu", scale=1 + normal(8, HIDDEN)),
        one(1, "attention", BottleneckInput.RESIDUAL, 1, keep=0.5, carry=0.25),
        one(1, "feed_forward", BottleneckInput.OUTPUT, 3, norm_after=norm, norm_residual=BottleneckInput.SUM),
    ]


def ends(model: LoadedModel) -> list[Delta]:
    vocab = model.architecture.vocab_size
    return [
        EmbeddingLowRank(normal(1, 3, vocab).t(), normal(2, HIDDEN, 3), 0.7),
        EmbeddingRows(torch.tensor([9, 4, 30]), normal(3, 3, HIDDEN)),
        HeadRows(torch.tensor([9, 4, 30]), normal(4, 3, HIDDEN)),
    ]


def other_head(model: LoadedModel) -> list[Delta]:
    vocab = model.architecture.vocab_size
    head = Site(-1, "lm_head")
    return [
        LowRank(head, normal(5, 3, HIDDEN), normal(6, vocab, 3), 0.5),
        HeadWeight(normal(7, vocab, HIDDEN)),
    ]


def low_rank(model: LoadedModel) -> list[Delta]:
    return list(random_lora(model.description, 5).deltas)


KINDS: dict[str, Callable[[LoadedModel], list[Delta]]] = {
    "low-rank": low_rank,
    "affine": affine,
    "input-scale": input_scale,
    "bottleneck": bottleneck,
    "ends": ends,
    "other-head": other_head,
}


def adapter(model: LoadedModel, kind: str) -> LoweredAdapter:
    return LoweredAdapter(digest_of(kind), tuple(KINDS[kind](model)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_primitive_through_both_backends_gives_the_oracles_logits(
    checkpoint: Any, model: LoadedModel, kind: str
) -> None:
    lowered = adapter(model, kind)
    ids = random_ids(1, 21, model.architecture.vocab_size)
    expected = logits_with(load_transformers(checkpoint), lowered, ids)
    for backend in (CpuBackend(1), TorchBackend()):
        runner = Runner(model, backend, adapters={1: lowered})
        (ran,) = runner.run([Prompt(ids, slot=1, new_tokens=0)], all_logits=True, max_tokens=8)
        torch.testing.assert_close(ran.stacked, expected, atol=VOCAB_TOLERANCE, rtol=1e-4)


def test_all_primitives_in_one_batch_are_each_as_alone_bit_for_bit(model: LoadedModel) -> None:
    adapters = {slot: adapter(model, kind) for slot, kind in enumerate(KINDS, start=1)}
    runner = Runner(model, CpuBackend(2), adapters=adapters)
    prompts = [
        Prompt(
            random_ids(i, 3 + 5 * i, model.architecture.vocab_size), slot=i % (len(KINDS) + 1), joins=i % 3
        )
        for i in range(2 * len(KINDS) + 2)
    ]
    mixed = runner.run(prompts, max_tokens=24, max_sequences=16)
    for prompt, together in zip(prompts, mixed, strict=True):
        (alone,) = runner.run([Prompt(prompt.token_ids, slot=prompt.slot)])
        assert alone.token_ids == together.token_ids
        assert torch.equal(alone.stacked, together.stacked)


def test_a_cleared_slot_is_the_base_again_and_holds_no_memory(model: LoadedModel) -> None:
    runner = Runner(model)
    prompt = Prompt(random_ids(2, 9, model.architecture.vocab_size), slot=1)
    (base,) = runner.run([Prompt(prompt.token_ids, slot=0)])
    for kind in KINDS:
        put(runner.slots, 1, adapter(model, kind))
        (changed,) = runner.run([prompt])
        assert not torch.equal(changed.stacked, base.stacked), kind
        runner.slots.clear(1)
        assert runner.slots.placed == {}
        (again,) = runner.run([prompt])
        assert torch.equal(again.stacked, base.stacked), kind


def test_the_kernel_knows_every_activation_as_torch_computes_it() -> None:
    assert set(bottleneck_kernels.ACTIVATIONS) == set(ACTIVATIONS)
    x, activate = torch.linspace(-12, 12, 193, dtype=torch.float64), from_python(bottleneck_kernels.activate)
    for index, name in enumerate(bottleneck_kernels.ACTIVATIONS):
        found = torch.tensor([activate(index, v) for v in x.tolist()])
        torch.testing.assert_close(found.double(), ACTIVATIONS[name](x), atol=1e-6, rtol=1e-6)


def kv_prefix(model: LoadedModel, num_tokens: int, offset: int) -> KVPrefix:
    attention = model.architecture.attention
    shape = (model.architecture.num_layers, num_tokens, attention.num_kv_heads, attention.head_dim)
    return KVPrefix(normal(num_tokens, *shape, scale=1.0), normal(num_tokens + 1, *shape, scale=1.0), offset)


def virtual(model: LoadedModel, kind: str, num_tokens: int) -> LoweredAdapter:
    deltas = tuple(random_lora(model.description, num_tokens).deltas) if kind == "prompt over lora" else ()
    prefix = {
        "prefix": lambda: kv_prefix(model, num_tokens, 0),
        "unshifted prefix": lambda: kv_prefix(model, num_tokens, -num_tokens),
        "prompt": lambda: PromptEmbeddings(normal(num_tokens, num_tokens, HIDDEN)),
        "prompt over lora": lambda: PromptEmbeddings(normal(num_tokens, num_tokens, HIDDEN)),
    }[kind]()
    return LoweredAdapter(digest_of(f"{kind} {num_tokens}"), deltas, prefix)


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 33])
@pytest.mark.parametrize("kind", ["prefix", "unshifted prefix", "prompt", "prompt over lora"])
async def test_virtual_tokens_through_the_engine_give_the_oracles_log_probabilities(
    checkpoint: Any, model: LoadedModel, kind: str, num_tokens: int
) -> None:
    lowered = virtual(model, kind, num_tokens)
    ids = random_ids(4, 19, model.architecture.vocab_size)
    logits = logits_with(load_transformers(checkpoint), lowered, ids)
    expected = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]
    async with running_engine(model, {"task": lowered}, max_num_batched_tokens=8) as engine:
        record = make_record("task", lowered.digest)
        request = make_request(
            ids, adapter=record, new_tokens=4, response=ResponseOptions(prompt_logprobs=True)
        )
        answer = await collect(engine, request)
        found = torch.tensor([token.logprob for token in answer.prompt_tokens[1:]])
        torch.testing.assert_close(found, expected.float(), atol=VOCAB_TOLERANCE, rtol=1e-4)
        assert answer.token_ids[0] == int(logits[-1].argmax())
        scored = await engine.score(
            ScoreRequest(
                id="s",
                prompt_token_ids=tuple(ids[:-2]),
                continuations=((ids[-2], ids[-1]),) * 2,
                adapter=record,
            )
        )
        for score in scored.scores:
            assert score.logprob == pytest.approx(float(expected[-2:].sum()), abs=1e-3)


async def test_requests_of_a_prompt_task_share_its_blocks_and_agree_with_each_alone(
    model: LoadedModel,
) -> None:
    lowered = virtual(model, "prompt", 33)
    record = make_record("task", lowered.digest)
    prompts = [random_ids(i, 3 + i, model.architecture.vocab_size) for i in range(8)]
    async with running_engine(model, {"task": lowered}) as engine:
        await engine.warm_adapter(record)
        assert engine.stats.kv_blocks_used == 0  # the first request puts them in place
        together = await asyncio.gather(
            *(collect(engine, make_request(ids, adapter=record, new_tokens=5)) for ids in prompts)
        )
        assert engine.stats.kv_blocks_used == 3
        for ids, answer in zip(prompts, together, strict=True):
            alone = await collect(engine, make_request(ids, adapter=record, new_tokens=5, cache_salt="alone"))
            assert alone.token_ids == answer.token_ids
        engine.forget_adapter(lowered.digest)
        await collect(engine, make_request(prompts[0], new_tokens=1))
        assert engine.stats.kv_blocks_used == 0


async def test_idle_virtual_tokens_give_way_to_a_request_that_needs_their_blocks(model: LoadedModel) -> None:
    lowered = virtual(model, "prefix", 33)
    record = make_record("task", lowered.digest)
    block_bytes = (
        2
        * model.architecture.num_layers
        * model.architecture.attention.num_kv_heads
        * model.architecture.attention.head_dim
        * 16
        * 4
    )
    async with running_engine(model, {"task": lowered}, kv_cache_bytes=6 * block_bytes) as engine:
        first = await collect(engine, make_request([5, 6, 7], adapter=record, new_tokens=4))
        base = await collect(
            engine, make_request(random_ids(1, 70, model.architecture.vocab_size), new_tokens=4)
        )
        assert len(base.token_ids) == 4
        assert engine.stats.kv_blocks_used == 0
        again = await collect(engine, make_request([5, 6, 7], adapter=record, new_tokens=4))
        assert again.token_ids == first.token_ids
