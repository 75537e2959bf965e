"""AdapterHub's own numbers on encoders and GPT-2, through the whole way: registered, stored, loaded, and read with."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.heads import Pooling
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import POOLER
from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.open import open_backend
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.engine import Engine
from manyhats.engine.home import default_home
from manyhats.engine.request import EncodeRequest, ResponseOptions
from support.factories.tiny_models import save_tokenizer
from support.harnesses.engine import collect, load_tiny, make_request, running_engine
from support.oracles.golden import ENCODER_FIXTURES, GOLDEN, adapterhub_directory, needs_golden

pytestmark = needs_golden

NUM_INPUTS = 3
ENCODERS = GOLDEN / "encoders"
MINILM = "all-minilm-l6-v2"
MINILM_NAME = "sentence-transformers/all-MiniLM-L6-v2"
OF_MINILM = [name for name in ENCODER_FIXTURES if name.startswith("minilm")]
SMALL = [name for name in ENCODER_FIXTURES if name.startswith("tiny")]


class Expected:
    """What the library gave for one fixture."""

    def __init__(self, fixture: str, variant: str = "dense") -> None:
        self._arrays = np.load(ENCODERS / fixture / f"expected_{variant}.npz")

    def __call__(self, index: int, name: str) -> Any:
        return self._arrays[f"p{index}_{name}"]

    def has(self, name: str) -> bool:
        return f"p0_{name}" in self._arrays

    def input(self, index: int) -> dict[str, Any]:
        types = (tuple(self(index, "types").tolist()),) if self.has("types") else ()
        return {"inputs": (tuple(self(index, "ids").tolist()),), "token_types": types}


@dataclass
class Found:
    """Of all inputs of some fixtures, by (fixture, input): what the engine found, and the fixtures' records."""

    records: dict[str, AdapterRecord] = field(default_factory=dict)
    hidden: dict[tuple[str, int], Any] = field(default_factory=dict)
    heads: dict[tuple[str, int], Any] = field(default_factory=dict)
    logprobs: dict[tuple[str, int], Any] = field(default_factory=dict)


async def read_all(
    model: LoadedModel, fixtures: Sequence[str], directory: Path, backend: str = "cpu"
) -> Found:
    """Everything that is compared, all fixtures in one batch; each input alone has the same bits."""
    found, calls = Found(), [(name, index) for name in fixtures for index in range(NUM_INPUTS)]
    roots = [directory, GOLDEN]
    with closing(open_store(directory / f"store-{backend}", model.description, roots)) as store:
        opened = open_backend(backend, dtype="float32", num_threads=1)
        async with running_engine(model, store.lower, backend=opened, max_num_batched_tokens=96) as engine:
            for name in fixtures:
                source = adapterhub_directory(f"encoders/{name}", directory / f"{backend}-{name}")
                registration = Registration(name.replace("_", "-"), Uri(str(source)))
                registered = await asyncio.to_thread(store.register, registration, probe=engine.probe)
                found.records[name] = registered.record
            await read_in_batches(engine, found, calls)
            if model.architecture.head is not None:
                for name, index in calls:
                    found.logprobs[name, index] = await next_logprobs(
                        engine, found.records[name], name, index
                    )
    return found


async def read_in_batches(engine: Engine, found: Found, calls: Sequence[tuple[str, int]]) -> None:
    async def read(name: str, index: int, pooling: Pooling | None) -> Any:
        asked = EncodeRequest(
            id="a",
            pooling=pooling,
            applies_head=pooling is None,
            adapter=found.records[name],
            **Expected(name).input(index),
        )
        return (await engine.encode(asked)).values[0]

    rows = await asyncio.gather(*(read(*call, Pooling.ALL) for call in calls))
    headed = [call for call in calls if Expected(call[0]).has("head")]
    outputs = await asyncio.gather(*(read(*call, None) for call in headed))
    found.hidden, found.heads = (
        dict(zip(calls, rows, strict=True)),
        dict(zip(headed, outputs, strict=True)),
    )
    for call in calls:
        assert np.array_equal(await read(*call, Pooling.ALL), found.hidden[call])
    for call in headed:
        assert np.array_equal(await read(*call, None), found.heads[call])


async def next_logprobs(engine: Engine, record: AdapterRecord, name: str, index: int) -> Any:
    (ids,) = Expected(name).input(index)["inputs"]
    response = ResponseOptions(prompt_logprobs=True)
    answer = await collect(engine, make_request(ids, record, new_tokens=1, response=response))
    return np.array([token.logprob for token in answer.prompt_tokens[1:]])


def assert_is_the_librarys(found: Found, fixture: str, variant: str, tolerance: float) -> None:
    expected = Expected(fixture, variant)
    assert found.records[fixture].effect
    assert found.records[fixture].method is ENCODER_FIXTURES[fixture]
    for index in range(NUM_INPUTS):
        for name, values in (
            ("hidden", found.hidden),
            ("head", found.heads),
            ("next_logprob", found.logprobs),
        ):
            if expected.has(name):
                ours, theirs = values[fixture, index], expected(index, name)
                np.testing.assert_allclose(
                    ours.reshape(theirs.shape), theirs, atol=tolerance, rtol=0, err_msg=name
                )


def load_base(base: str, directory: Path) -> LoadedModel:
    """A tiny base, copied and given a tokenizer."""
    (directory / base).mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ENCODERS / "bases" / base / name, directory / base / name)
    save_tokenizer(directory / base)
    return load_tiny(directory / base)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Found]:
    """What is found of all fixtures of a tiny base, by backend; run once each."""

    @cache
    def run(base: str, backend: str) -> Found:
        directory = tmp_path_factory.mktemp(f"{base}-{backend}")
        fixtures = [name for name in SMALL if name.startswith(base)]
        return asyncio.run(read_all(load_base(base, directory), fixtures, directory, backend))

    return run


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("fixture", SMALL)
def test_tiny_bases_give_the_librarys_values(
    fixture: str, backend: str, small: Callable[[str, str], Found]
) -> None:
    assert_is_the_librarys(small(fixture.partition("_")[0], backend), fixture, "dense", 1e-4)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("base", ["tinyalbert", "tinydistil", "tinyroberta"])
def test_bare_bases_give_the_librarys_values(tmp_path: Path, base: str, backend: str) -> None:
    expected, model = Expected(f"bases/{base}"), load_base(base, tmp_path)

    async def read() -> list[Any]:
        opened = open_backend(backend, dtype="float32", num_threads=1)
        async with running_engine(model, backend=opened) as engine:
            asked = [
                EncodeRequest(id="a", pooling=pooling, **expected.input(index))
                for index in range(NUM_INPUTS)
                for pooling in (Pooling.ALL, Pooling.MEAN)
            ]
            return [(await engine.encode(each)).values[0] for each in asked]

    found = asyncio.run(read())
    for index in range(NUM_INPUTS):
        rows, mean = found[2 * index], found[2 * index + 1][0]
        np.testing.assert_allclose(rows, expected(index, "hidden"), atol=1e-4, rtol=0)
        mean = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(mean, expected(index, "mean"), atol=1e-4, rtol=0)
        if expected.has("pooled"):
            assert model.description.weights is not None
            weight, bias = (
                part.numpy() for part in model.description.weights.linear(POOLER) if part is not None
            )
            pooled = np.tanh(weight @ rows[0] + bias)
            np.testing.assert_allclose(pooled, expected(index, "pooled"), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What is found of all of MiniLM's fixtures, by variant; run once each."""

    @cache
    def run(variant: str) -> Found:
        source = locate_model(MINILM, default_home()).directory
        quantization: Any = "none" if variant == "dense" else variant
        model = load_model(str(source), quantization=quantization, dtype=torch.float32, names=[MINILM_NAME])
        return asyncio.run(read_all(model, OF_MINILM, tmp_path_factory.mktemp(variant)))

    return run


@pytest.mark.real_model
@pytest.mark.parametrize(("variant", "tolerance"), [("dense", 1e-4), ("nf4", 1e-3)])
@pytest.mark.parametrize("fixture", OF_MINILM)
def test_minilm_gives_the_librarys_values(
    fixture: str, variant: str, tolerance: float, minilm: Callable[[str], Found]
) -> None:
    assert_is_the_librarys(minilm(variant), fixture, variant, tolerance)


def test_every_fixture_beside_the_checkout_is_compared_with() -> None:
    found = {path.parent.name for path in ENCODERS.glob("*/adapter")}
    assert found == set(ENCODER_FIXTURES)
