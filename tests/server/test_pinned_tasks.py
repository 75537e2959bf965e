"""Pinned tasks on a real engine and a real store, over a real port: under pressure they never load again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from manyhats.client import AsyncClient, ManyhatsError
from manyhats.server.lifetime.config_file import make_config
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.registrations import Registrations
from support.factories.adapters import make_lora
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny
from support.harnesses.engine_server import served_config

NUM_TASKS = 8


@asynccontextmanager
async def serving(tmp_path: Path, memory_bytes: int) -> AsyncIterator[AsyncClient]:
    config = make_config(
        {
            "model": str(tmp_path / "model"),
            "quantization": "none",
            "dtype": "float32",
            "store": tmp_path / "store",
            "adapter_roots": (tmp_path,),
            "adapter_memory_bytes": memory_bytes,
            "kv_cache_bytes": 4 << 20,
            "num_threads": 1,
        }
    )
    async with served_config(config) as (address, backend), AsyncClient(address) as client:
        await Registrations(backend, Metrics(max_task_labels=1)).follow_pins()  # as its process does
        yield client


async def load_ms(client: AsyncClient, task: str) -> float:
    """How long a request waited for its adapter."""
    return (await client.generate("the", task_id=task, max_new_tokens=2)).usage.adapter_load_ms


async def test_pinned_tasks_never_wait_for_their_adapters_whatever_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHATS_HOME", str(tmp_path / "home"))
    base = load_tiny(make_checkpoint(tmp_path / "model")).description
    tasks = [f"t{index}" for index in range(NUM_TASKS)]
    sources = [make_lora(tmp_path / task, base, rank=4, seed=seed) for seed, task in enumerate(tasks)]
    async with serving(tmp_path, memory_bytes=1 << 30) as client:
        for task, source in zip(tasks, sources, strict=True):
            await client.register_adapter(task, str(source))
        assert (await client.pin_adapter("t0")).pinned
    # A little more than two of them, so that the third evicts one; and a start, which must load what is pinned.
    size = (sources[0] / "adapter_model.safetensors").stat().st_size
    async with serving(tmp_path, memory_bytes=int(2.5 * size)) as client:
        assert (await client.get_adapter("t0")).residency != "disk"
        for _ in range(2):
            loads = [await load_ms(client, task) for task in tasks[1:]]
            assert all(waited > 0 for waited in loads), "they make room for each other"
            assert await load_ms(client, "t0") == 0
        cold = asyncio.gather(*(load_ms(client, task) for task in tasks[1:]))
        assert await load_ms(client, "t0") == 0
        assert len(await cold) == NUM_TASKS - 1
        # One more fits beside it, two do not.
        assert (await client.pin_adapter("t1")).pinned
        with pytest.raises(ManyhatsError, match="are pinned") as refused:
            await client.pin_adapter("t2")
        assert refused.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED.name
        assert not (await client.get_adapter("t2")).pinned
        assert await load_ms(client, "t2") >= 0, "and others are served all the same"
        await client.unpin_adapter("t0")
        await client.unpin_adapter("t1")
        for task in tasks[2:]:
            await load_ms(client, task)
        assert await load_ms(client, "t0") > 0, "it has made room"
