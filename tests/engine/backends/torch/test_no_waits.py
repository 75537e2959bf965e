"""The engine's loop on all rows at once waits for the device in ``Pending.result`` alone."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.heads import Pooling
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.torch.batched.logits import DeviceLogits
from manyhats.engine.backends.torch.batched.model import BatchedModel
from manyhats.engine.engine import Engine
from manyhats.engine.request import EncodeRequest, Request, ResponseOptions, SamplingParams
from support.factories.adapterhub import make_adapterhub
from support.factories.every_method import COMPOSED, PLAIN, Sizes, register_every_method
from support.factories.tiny_encoders import make_encoder
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.gpu.no_sync import guard
from support.harnesses.backends import batched_backend
from support.harnesses.encoding import read_all
from support.harnesses.engine import (
    collect,
    load_tiny,
    make_record,
    make_request,
    random_ids,
    random_lora,
    running_engine,
)
from support.harnesses.engine_loop import score_request

GATED = ("gated_seq_bn", "gated_lora", "gated_ia3", "gated_prefix", "gated_prefix_flat", "unipelt")
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95, seed=1),
    SamplingParams(
        temperature=0.5, seed=2, repetition_penalty=1.2, presence_penalty=0.1, logit_bias={7: 2.0}
    ),
)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches under the guard; what was launched."""
    return guard(monkeypatch, BatchedModel, DeviceLogits)


def requests(records: list[Any]) -> list[Request]:
    return [
        make_request(
            random_ids(index, 3 + 7 * index % 40, TINY_VOCAB_SIZE),
            record,
            new_tokens=5,
            sampling=SAMPLINGS[index % 3],
            response=ResponseOptions(logprobs=True, top_logprobs=2, prompt_logprobs=index % 2 == 0),
        )
        for index, record in enumerate(records)
    ]


async def answer_all(engine: Engine, records: list[Any]) -> None:
    for record in records:
        if record is not None:
            await engine.warm_adapter(record)
    answers = await asyncio.gather(*(collect(engine, each) for each in requests(records)))
    assert all(len(answer.token_ids) == 5 for answer in answers)


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_no_family_waits(tmp_path: Path, guarded: list[str], family: str, dtype: str) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", family, seed=3), "nf4")
    load = {f"task {slot}": random_lora(model.description, slot) for slot in (1, 2)}
    async with running_engine(model, load, backend=batched_backend(dtype), dtype=dtype) as engine:
        await answer_all(engine, [None, *map(make_record, load), None])
        asked = score_request(random_ids(1, 9, TINY_VOCAB_SIZE), [[7, 8], [9]])
        assert len((await engine.score(asked)).scores) == 2
    assert {"forward", "finish"} <= set(guarded)


async def test_no_method_waits(tmp_path: Path, guarded: list[str]) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=3))
    with closing(open_store(tmp_path / "store", model.description, [tmp_path])) as store:
        register_every_method(store, tmp_path / "sources", model.description, Sizes())
        options = {"kv_cache_bytes": 16 << 20, "max_num_sequences": 32, "max_num_batched_tokens": 64}
        async with running_engine(model, store.lower, backend=batched_backend(), **options) as engine:
            await answer_all(engine, [store.resolve(task) for task in (*PLAIN, *COMPOSED)])
    assert {"forward", "finish"} <= set(guarded)


def test_no_method_of_encoders_waits(tmp_path: Path, guarded: list[str]) -> None:
    model = load_tiny(make_encoder(tmp_path / "model", seed=3))
    names = (*GATED, "noreft", "seq_bn_inv", "prompt")
    for seed, name in enumerate(names):
        make_adapterhub(tmp_path / name, model.description, name, seed=seed, scale=0.3)
    found = asyncio.run(read_all(model, tmp_path, names, "torch-batched"))
    assert set(found) == {"", *names}
    assert {"forward", "finish"} <= set(guarded)


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert"])
async def test_no_encoder_waits(tmp_path: Path, guarded: list[str], family: str) -> None:
    model = load_tiny(make_encoder(tmp_path / "model", family, seed=3))
    async with running_engine(model, backend=batched_backend(), max_num_batched_tokens=64) as engine:
        texts = tuple(tuple(random_ids(length, length, TINY_VOCAB_SIZE)) for length in (1, 9, 60))
        found = await engine.encode(EncodeRequest(id="a", inputs=texts, pooling=Pooling.ALL))
    assert [len(values) for values in found.values] == [1, 9, 60]
    assert {"forward", "finish"} <= set(guarded)
