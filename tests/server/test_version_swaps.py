"""Swaps of versions under load, on a real engine and a real store: every request runs on one version, wholly."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from manyhats.adapters.sites import BaseDescription
from manyhats.server.lifetime.config_file import make_config
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.factories.adapters import make_ia3, make_lora
from support.factories.prefixes import make_prefix
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import served_config

if TYPE_CHECKING:
    from manyhats.v1.adapter_pb2_grpc import AdapterServiceAsyncStub
    from manyhats.v1.generation_pb2_grpc import GenerationServiceAsyncStub

NUM_SWAPS = 200
NUM_CALLERS = 6
# Of one beginning, so that cached prefixes are there to be mixed up.
PROMPTS = ("the quick brown fox and the", "the quick brown fox and then", "the quick brown dog")
TASK = "hats"


class Server:
    """A client's view of a server with a tiny real model."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.adapters: AdapterServiceAsyncStub = AdapterServiceStub(channel)
        self.generation: GenerationServiceAsyncStub = GenerationServiceStub(channel)

    async def register(self, directory: Path) -> pb.Adapter:
        request = pb.RegisterAdapterRequest(task_id=TASK, uri=str(directory))
        return (await self.adapters.RegisterAdapter(request)).adapter

    async def compose(self, *parts: tuple[Path, float]) -> pb.Adapter:
        given = [pb.AdapterPart(uri=str(directory), weight=weight) for directory, weight in parts]
        request = pb.RegisterAdapterRequest(task_id=TASK, parts=given)
        return (await self.adapters.RegisterAdapter(request)).adapter

    async def activate(self, version: int) -> None:
        await self.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id=f"{TASK}@{version}"))

    async def generate(self, prompt: str, name: str = TASK) -> generation_pb2.GenerateResponse:
        return await self.generation.Generate(_request(prompt, name))

    async def stream(self, prompt: str) -> tuple[pb.AdapterRef, tuple[int, ...]]:
        """The adapter that a stream names, and its tokens."""
        pieces = [piece async for piece in self.generation.GenerateStream(_request(prompt, TASK))]
        return pieces[0].adapter, tuple(token.id for piece in pieces for token in piece.tokens)


def _request(prompt: str, name: str) -> generation_pb2.GenerateRequest:
    stopping = generation_pb2.StoppingParams(max_new_tokens=6, ignore_eos=True)
    return generation_pb2.GenerateRequest(task_id=name, text=prompt, stopping=stopping)


def ids(answer: generation_pb2.GenerateResponse) -> tuple[int, ...]:
    return tuple(token.id for token in answer.tokens)


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Server]:
    make_checkpoint(tmp_path / "model")
    config = make_config(
        {
            "model": str(tmp_path / "model"),
            "quantization": "none",
            "dtype": "float32",
            "store": tmp_path / "store",
            "adapter_roots": (tmp_path,),
            "kv_cache_bytes": 4 << 20,
            "num_threads": 1,
        }
    )
    async with (
        served_config(config) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Server(channel)


def make_versions(directory: Path, base: BaseDescription) -> list[Path]:
    """Adapters that act in different ways, each strong enough to change what is said."""
    return [
        make_lora(directory / "low", base, rank=2, seed=1, scale=0.5),
        make_prefix(directory / "prefix", base, num_virtual_tokens=5, seed=2),
        make_lora(directory / "high", base, rank=16, seed=3, scale=0.5),
        make_ia3(directory / "ia3", base, seed=4),
    ]


async def test_requests_in_flight_during_swaps_each_run_on_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path / "home"))
    async with serving(tmp_path) as server:
        sources = make_versions(tmp_path / "adapters", load_tiny(tmp_path / "model").description)
        adapters = [await server.register(each) for each in sources]
        low, prefix, *_ = sources
        adapters.append(await server.compose((low, 0.5), (prefix, 1.0)))
        digests = {adapter.version: adapter.digest for adapter in adapters}
        alone = {
            (version, prompt): ids(await server.generate(prompt, f"{TASK}@{version}"))
            for version, prompt in itertools.product(digests, PROMPTS)
        }
        assert len(set(alone.values())) == len(alone), "the versions cannot be told apart"
        answers: list[tuple[str, pb.AdapterRef, tuple[int, ...]]] = []
        is_over = asyncio.Event()

        async def call(seed: int) -> None:
            chance = random.Random(seed)
            while not is_over.is_set():
                prompt = chance.choice(PROMPTS)
                if chance.random() < 0.5:
                    answers.append((prompt, *await server.stream(prompt)))
                else:
                    answer = await server.generate(prompt)
                    answers.append((prompt, answer.adapter, ids(answer)))

        callers = [asyncio.create_task(call(seed)) for seed in range(NUM_CALLERS)]
        chance = random.Random(0)
        for _ in range(NUM_SWAPS):
            await server.activate(chance.choice(list(digests)))
        is_over.set()
        await asyncio.gather(*callers)  # a request that failed fails the test

    assert len(answers) > NUM_CALLERS
    assert {adapter.version for _, adapter, _ in answers} == digests.keys()
    for prompt, adapter, tokens in answers:
        assert adapter.digest == digests[adapter.version]
        assert tokens == alone[adapter.version, prompt]
