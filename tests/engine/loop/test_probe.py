"""The effect of an adapter, measured on the engine beside its requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    InputScale,
    KVPrefix,
    LoweredAdapter,
    LowRank,
    PromptEmbeddings,
)
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.config import EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.errors import DrainingError, EngineDeadError, ModelError
from manyhats.engine.loop.probe import changed_tokens, effect, probe_prompt
from manyhats.engine.opening import open_engine
from manyhats.engine.output import StepStats
from support.factories.adapterhub import make_adapterhub
from support.factories.adapters import (
    make_adalora,
    make_dora,
    make_ia3,
    make_lora,
    make_token_rows,
    make_trainable_tokens,
    make_vera,
)
from support.factories.prefixes import make_multitask_prompt, make_p_tuning, make_prefix, make_prompt
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.backends import default_backend, default_model
from support.harnesses.engine import (
    collect,
    digest_of,
    load_tiny,
    make_record,
    make_request,
    overflowing_lora,
    random_ids,
    random_lora,
    read_lora,
    running_engine,
    until,
)
from support.oracles.primitives import logits_with
from support.oracles.transformers import load_transformers

HIDDEN = 64
LONG = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("probe") / "tiny", seed=21, tie=True)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_tiny(checkpoint)


def normal(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def lowered(name: str, *deltas: Delta, prefix: KVPrefix | PromptEmbeddings | None = None) -> LoweredAdapter:
    return LoweredAdapter(digest_of(name), deltas, prefix)


async def probe(engine: Engine, adapter: LoweredAdapter) -> float:
    return await asyncio.to_thread(engine.probe, adapter)


def placed(engine: Engine) -> Mapping[int, object]:
    """The adapters in slots."""
    slots: Any = engine._probe._slots
    return slots.placed  # type: ignore[no-any-return]


def held(engine: Engine) -> tuple[object, ...]:
    """All that a probe could leave behind."""
    stats = engine.stats
    return (
        stats.num_running,
        stats.num_waiting,
        stats.kv_blocks_used,
        stats.kv_blocks_cached,
        engine.model_bytes,
        engine.resident_digests(),
        engine._probe._slot in placed(engine),
    )


async def until_held(engine: Engine, before: tuple[object, ...]) -> None:
    """Blocks come back at the engine's next turn."""
    with contextlib.suppress(TimeoutError):
        await until(lambda: held(engine) == before, timeout_s=5)
    assert held(engine) == before


# Without effect


def disjoint_lora(base: BaseDescription) -> LoweredAdapter:
    """B · A is 0 though neither is: each rank has weights on one side only."""
    deltas = []
    for site in (Site(0, "q_proj"), Site(1, "down_proj")):
        d_in, d_out = base.linears[site.name]
        a, b = normal(1, 4, d_in), normal(2, d_out, 4)
        a[:2] = 0
        b[:, 2:] = 0
        deltas.append(LowRank(site, a, b, 2.0))
    return lowered("disjoint", *deltas)


def dead_bottleneck(base: BaseDescription) -> LoweredAdapter:
    """Nothing passes its ReLU, whatever comes."""
    return lowered(
        "dead",
        Bottleneck(
            site=Site(1, "feed_forward"),
            input=BottleneckInput.OUTPUT,
            down=torch.zeros(8, HIDDEN),
            down_bias=torch.full((8,), -1.0),
            up=normal(3, HIDDEN, 8),
            up_bias=torch.zeros(HIDDEN),
            activation="relu",
            scale=torch.ones(1),
        ),
    )


def ones(base: BaseDescription) -> LoweredAdapter:
    d_in, d_out = base.linears["down_proj"][0], base.linears["k_proj"][1]
    return lowered(
        "ones",
        Affine(Site(0, "k_proj"), torch.ones(d_out), None),
        InputScale(Site(0, "down_proj"), torch.ones(d_in)),
    )


def useless_embedding(base: BaseDescription) -> LoweredAdapter:
    a, b = normal(4, base.vocab_size, 4), normal(5, HIDDEN, 4)
    a[:, :2] = 0
    b[:, 2:] = 0
    return lowered("useless embedding", EmbeddingLowRank(a, b, 1.0))


USELESS = {
    "lora": disjoint_lora,
    "bottleneck": dead_bottleneck,
    "ia3": ones,
    "embedding": useless_embedding,
    "nothing": lambda base: lowered("nothing"),
}


@pytest.mark.bits
@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")]
)
async def test_an_adapter_that_changes_nothing_has_exactly_no_effect_beside_others(
    checkpoint: Path, quantization: Literal["none", "nf4"], dtype: str
) -> None:
    model = load_tiny(checkpoint, quantization)
    others = {"a": random_lora(model.description, 1)}
    async with running_engine(model, others, dtype=dtype, num_threads=2) as engine:
        load = [
            asyncio.create_task(
                collect(engine, make_request(random_ids(seed, 9, TINY_VOCAB_SIZE), adapter, new_tokens=60))
            )
            for seed, adapter in enumerate((None, make_record("a"), None))
        ]
        for make in USELESS.values():
            assert await probe(engine, make(model.description)) == 0.0
        await asyncio.gather(*load)


async def test_rows_equal_to_the_base_s_have_no_effect(model: LoadedModel) -> None:
    ids = torch.tensor([300, 9])
    rows = model.weights.embedding[ids].clone()
    async with running_engine(model) as engine:
        found = await probe(engine, lowered("rows", EmbeddingRows(ids, rows), HeadRows(ids, rows)))
    # The CPU's kernels compute each row of a head alike; plain torch may round a product of fewer rows differently.
    assert found <= (1e-6 if default_backend().name == "torch" else 0.0)


# With effect


METHODS: dict[str, Callable[[Path, BaseDescription], Path]] = {
    "lora": make_lora,
    "dora": make_dora,
    "adalora": make_adalora,
    "vera": make_vera,
    "ia3": make_ia3,
    "token rows": lambda path, base: make_token_rows(path, base, [301, 17]),
    "prefix tuning": lambda path, base: make_prefix(path, base, num_virtual_tokens=19),
    "prompt tuning": lambda path, base: make_prompt(path, base, num_virtual_tokens=19),
    "p-tuning": make_p_tuning,
    "multitask prompt tuning": make_multitask_prompt,
    "trainable tokens": make_trainable_tokens,
    "adapterhub seq_bn": lambda path, base: make_adapterhub(path, base, "seq_bn"),
    "adapterhub double_seq_bn": lambda path, base: make_adapterhub(path, base, "double_seq_bn"),
    "adapterhub par_bn": lambda path, base: make_adapterhub(path, base, "par_bn"),
    "adapterhub lora": lambda path, base: make_adapterhub(path, base, "lora"),
    "adapterhub ia3": lambda path, base: make_adapterhub(path, base, "ia3"),
    "adapterhub prefix": lambda path, base: make_adapterhub(path, base, "prefix"),
    "adapterhub union": lambda path, base: make_adapterhub(path, base, "mam"),
}


async def test_every_method_s_effect_is_what_the_oracle_s_logits_give(
    checkpoint: Path, model: LoadedModel, tmp_path: Path
) -> None:
    oracle = load_transformers(checkpoint)
    async with running_engine(model) as engine:
        before = held(engine)
        for name, make in METHODS.items():
            adapter = read_lora(make(tmp_path / name, model.description), model.description)
            ids = (
                *probe_prompt(model.tokenizer, TINY_VOCAB_SIZE),
                *changed_tokens(adapter.deltas, model.weights.embedding, 4),
            )
            logits = [logits_with(oracle, a, ids) for a in (lowered("base"), adapter)]
            change = (logits[1].double().log_softmax(-1) - logits[0].double().log_softmax(-1)).abs()
            expected = float(change.max(dim=1).values.mean())
            assert expected > 1e-3, name
            assert await probe(engine, adapter) == pytest.approx(expected, rel=1e-2, abs=1e-4), name
            await until_held(engine, before)


@pytest.mark.parametrize("token", [0, 5, TINY_VOCAB_SIZE - 1])
async def test_one_trained_token_shows_wherever_it_is(model: LoadedModel, token: int) -> None:
    a = torch.zeros(TINY_VOCAB_SIZE, 4)
    a[token] = 0.5
    low_rank = lowered("one of all", EmbeddingLowRank(a, normal(7, HIDDEN, 4), 1.0))
    rows = model.weights.embedding.clone()
    rows[token] += 0.1
    replaced = lowered("rows", EmbeddingRows(torch.arange(TINY_VOCAB_SIZE), rows))
    head = lowered("head", HeadRows(torch.tensor([token]), normal(8, 1, HIDDEN)))
    async with running_engine(model) as engine:
        for adapter in (low_rank, replaced, head):
            assert await probe(engine, adapter) > 1e-3


async def test_the_effect_grows_with_the_adapter_and_is_the_same_each_time(model: LoadedModel) -> None:
    adapters = [random_lora(model.description, 4, size=size) for size in (0.001, 0.01, 0.1)]
    async with running_engine(model) as engine:
        first = [await probe(engine, adapter) for adapter in adapters]
        assert first == sorted(first)
        assert first[0] > 0
        assert [await probe(engine, adapter) for adapter in adapters] == first


# What it refuses


def huge_prompt(base: BaseDescription) -> LoweredAdapter:
    return lowered("prompt", *overflowing_lora(base).deltas, prefix=PromptEmbeddings(normal(1, 5, HIDDEN)))


def huge_prefix(base: BaseDescription) -> LoweredAdapter:
    shape = (base.num_layers, 5, base.num_kv_heads, base.head_dim)
    return lowered("prefix", prefix=KVPrefix(normal(1, *shape), torch.full(shape, 3e38), 0))


@pytest.mark.parametrize("make", [overflowing_lora, huge_prompt, huge_prefix])
async def test_an_adapter_whose_numbers_overflow_is_invalid_and_leaves_no_trace(
    model: LoadedModel, make: Callable[[BaseDescription], LoweredAdapter]
) -> None:
    request = make_request(random_ids(1, 40, TINY_VOCAB_SIZE), new_tokens=30)
    async with running_engine(model) as engine:
        expected = await collect(engine, request)
        before = held(engine)
        beside = asyncio.create_task(collect(engine, request))
        with pytest.raises(AdapterInvalidError, match="not finite"):
            await probe(engine, make(model.description))
        assert (await beside).tokens == expected.tokens
        await until_held(engine, before)
        assert await probe(engine, random_lora(model.description, 1)) > 0
        assert (await collect(engine, request)).tokens == expected.tokens


async def test_virtual_tokens_that_leave_no_room_are_refused(model: LoadedModel) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4
    async with running_engine(model, kv_cache_bytes=4 * block_bytes) as engine:
        before = held(engine)
        # The prompt has 8 tokens, the pool 64.
        assert await probe(engine, lowered("fits", prefix=PromptEmbeddings(normal(1, 56, HIDDEN)))) > 0
        with pytest.raises(AdapterTooLargeError, match="num_virtual_tokens: are 57"):
            await probe(engine, lowered("too long", prefix=PromptEmbeddings(normal(1, 57, HIDDEN))))
        await until_held(engine, before)
    async with running_engine(model) as engine:
        with pytest.raises(AdapterTooLargeError, match="context of 512"):
            await probe(engine, lowered("too long", prefix=PromptEmbeddings(normal(1, 505, HIDDEN))))


async def test_what_the_kernels_cannot_run_is_refused_and_leaves_its_slot_clean(model: LoadedModel) -> None:
    twice = random_lora(model.description, 1).deltas
    async with running_engine(model, backend=CpuBackend()) as engine:
        with pytest.raises(ModelError, match="one low-rank delta a site"):
            await probe(engine, lowered("twice", *twice, *twice))
        assert await probe(engine, disjoint_lora(model.description)) == 0.0
        assert await probe(engine, random_lora(model.description, 1)) > 0


# Beside requests


def some_adapters(base: BaseDescription) -> list[LoweredAdapter]:
    shape = (base.num_layers, 21, base.num_kv_heads, base.head_dim)
    return [
        random_lora(base, 3),
        lowered("prefix", prefix=KVPrefix(normal(1, *shape, scale=1.0), normal(2, *shape, scale=1.0), 0)),
        lowered("prompt", *random_lora(base, 5).deltas, prefix=PromptEmbeddings(normal(3, 37, HIDDEN))),
        dead_bottleneck(base),
    ]


@pytest.mark.bits
async def test_probes_at_once_change_no_stream_and_leave_nothing(model: LoadedModel) -> None:
    adapters = {"a": random_lora(model.description, 1), "b": some_adapters(model.description)[2]}
    records = [make_record(task, adapter.digest) for task, adapter in adapters.items()]
    requests = [
        make_request(random_ids(seed, 3 + 7 * seed, TINY_VOCAB_SIZE), record, new_tokens=60)
        for seed, record in enumerate((None, *records))
    ]
    probed = some_adapters(model.description)
    async with running_engine(model, adapters, max_num_batched_tokens=16) as engine:
        expected = [await collect(engine, request) for request in requests]
        alone = [await probe(engine, adapter) for adapter in probed]
        before = held(engine)
        assert engine.resident_digests() == {adapter.digest for adapter in adapters.values()}
        streams = asyncio.gather(*(collect(engine, request) for request in requests))
        together = await asyncio.gather(*(probe(engine, adapter) for adapter in probed * 2))
        answers = await streams
        await until_held(engine, before)
    assert together == alone * 2
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


async def test_a_probe_waits_for_no_slot_no_place_and_no_queue(model: LoadedModel) -> None:
    """Every slot, every running place and the whole queue are taken by requests that go on for long."""
    adapters = {"a": random_lora(model.description, 1)}
    async with running_engine(
        model, adapters, max_loaded_adapters=1, max_num_sequences=1, max_waiting=1
    ) as engine:
        requests = [
            make_request(random_ids(seed, 5, TINY_VOCAB_SIZE), make_record("a"), priority=9, new_tokens=LONG)
            for seed in range(2)
        ]
        tasks = [asyncio.create_task(collect(engine, requests[0]))]
        await until(lambda: engine.stats.num_running == 1)
        tasks.append(asyncio.create_task(collect(engine, requests[1])))
        await until(lambda: engine.stats.num_waiting == 1)
        for adapter in some_adapters(model.description):
            await probe(engine, adapter)
        assert not any(task.done() for task in tasks)
        assert engine.resident_digests() == {digest_of("a")}
        assert engine.residency_stats.num_evictions == 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_step_in_which_a_stream_decodes_takes_few_rows_of_a_probe(model: LoadedModel) -> None:
    steps: list[StepStats] = []
    async with running_engine(model) as engine:
        stream = engine.generate(make_request(random_ids(1, 5, TINY_VOCAB_SIZE), new_tokens=LONG))
        await anext(stream)
        engine.loop.on_step = steps.append
        for adapter in some_adapters(model.description):
            await probe(engine, adapter)
        await stream.aclose()
    probing = [stats for stats in steps if stats.num_prefill_tokens]
    assert len(probing) > 10
    assert all(stats.num_decode_tokens == 1 and stats.num_prefill_tokens <= 3 for stats in probing)
    assert sum(stats.prefix_cache_queries for stats in steps) == 0


# Life


async def test_a_probe_of_an_engine_that_dies_is_told(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(model) as engine:
        for adapter in some_adapters(model.description):
            await probe(engine, adapter)
        entered = threading.Event()

        def broken(*_: Any) -> Any:
            entered.set()
            raise SystemExit("the decoder broke")

        monkeypatch.setattr(default_model(), "forward", broken)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(probe(engine, random_lora(model.description, 1)), 10)
        assert entered.is_set()
        assert engine._probe._slot not in placed(engine)
        for adapter in some_adapters(model.description):
            with pytest.raises(EngineDeadError):
                await probe(engine, adapter)


async def test_an_engine_that_stops_ends_the_probe_that_runs(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()
    forward = default_model().forward

    def held_up(*arguments: Any) -> Any:
        entered.set()
        assert gate.wait(20)
        return forward(*arguments)

    async with running_engine(model) as engine:
        monkeypatch.setattr(default_model(), "forward", held_up)
        probing = asyncio.create_task(probe(engine, random_lora(model.description, 1)))
        await until(entered.is_set)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await probe(engine, random_lora(model.description, 1))
        gate.set()
        await stopping
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(probing, 10)
        assert engine._probe._slot not in placed(engine)


async def test_an_engine_that_never_started_measures_nothing(model: LoadedModel) -> None:
    engine = open_engine(model, EngineConfig(num_threads=1), lambda record: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(EngineDeadError):
        await probe(engine, random_lora(model.description, 1))
    await engine.stop()


# Its parts


@given(
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    shape=st.tuples(*[st.integers(1, 9)] * 2),
)
def test_the_effect_equals_that_of_float64_log_softmax(
    seed: int, scale: float, shape: tuple[int, int]
) -> None:
    before, after = normal(seed, *shape, scale=scale), normal(seed + 1, *shape, scale=scale)
    change = (after.double().log_softmax(-1) - before.double().log_softmax(-1)).abs().max(dim=1).values
    assert effect(before.numpy(), after.numpy()) == pytest.approx(float(change.mean()), rel=1e-5, abs=1e-6)
    assert effect(before.numpy(), before.numpy().copy()) == 0.0


@settings(deadline=None)
@given(
    trained=st.dictionaries(st.integers(0, 49), st.floats(0.1, 5), max_size=8),
    replaced=st.dictionaries(st.integers(0, 49), st.floats(0, 5), min_size=1, max_size=8),
    count=st.integers(0, 6),
)
def test_the_tokens_that_change_most_are_those_of_the_dense_difference(
    trained: dict[int, float], replaced: dict[int, float], count: int
) -> None:
    embeddings, b = normal(1, 50, 16), normal(2, 16, 3)
    a = torch.zeros(50, 3)
    for token, size in trained.items():
        a[token] = size * normal(3 + token, 3)
    ids = torch.tensor(list(replaced))
    rows = embeddings[ids] + torch.tensor(list(replaced.values())).unsqueeze(1)
    deltas = [EmbeddingLowRank(a, b, -0.5), EmbeddingRows(ids, rows)]
    sizes = (0.5 * (a @ b.t())).norm(dim=1)
    sizes[ids] += (rows - embeddings[ids]).norm(dim=1)
    found = changed_tokens(deltas, embeddings, count)
    expected = sizes.sort(descending=True).values[: min(count, int((sizes > 0).sum()))]
    assert len(set(found)) == len(found) == len(expected)
    np.testing.assert_allclose(sizes[list(found)].numpy(), expected.numpy(), rtol=1e-3)
