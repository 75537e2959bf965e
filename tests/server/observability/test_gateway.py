"""What an inference gateway finds in ``/metrics``, read as its endpoint picker does."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import dataclass

from prometheus_client import parser

from manyhats.v1 import adapter_pb2
from support.fakes.server import Running, running_server


@dataclass(frozen=True)
class Endpoint:
    """A replica, as the picker knows it after a scrape."""

    base: str
    num_running: float
    num_waiting: float
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int
    running: frozenset[str]
    waiting: frozenset[str]

    def affinity(self, model: str) -> float:
        """The score of the picker's ``lora-affinity-scorer``."""
        if model in self.running:
            return 1.0
        if len(self.running) + len(self.waiting) < self.max_adapters:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


async def scraped(server: Running) -> Endpoint:
    def get() -> str:
        with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    samples = {}
    for family in parser.text_string_to_metric_families(await asyncio.to_thread(get)):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert sample.name not in samples, "the picker takes any one of several series"
                samples[sample.name] = sample
    adapters = samples["vllm:lora_requests_info"].labels
    config = samples.get("vllm:cache_config_info")
    gauges = [
        samples.get(f"vllm:{name}")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ]
    bases = {each.labels["model_name"] for each in [*gauges, config] if each is not None}
    assert len(bases) <= 1
    return Endpoint(
        next(iter(bases), ""),
        *(-1.0 if each is None else each.value for each in gauges),
        int(config.labels["block_size"]) if config else 0,
        int(config.labels["num_gpu_blocks"]) if config else 0,
        int(adapters["max_lora"]),
        *(
            frozenset(name.strip() for name in adapters[f"{state}_lora_adapters"].split(",") if name)
            for state in ("running", "waiting")
        ),
    )


async def register(server: Running, task_id: str, uri: str) -> None:
    await server.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(task_id=task_id, uri=uri))


async def test_nothing_is_placed_on_a_replica_that_loads() -> None:
    async with running_server(is_open=False) as server:
        found = await scraped(server)
    assert (found.max_adapters, found.running, found.waiting) == (0, frozenset(), frozenset())
    assert found.affinity("sql") == 0


async def test_how_busy_it_is() -> None:
    async with running_server() as server:
        found = await scraped(server)
    assert (found.base, found.num_running, found.num_waiting) == ("echo", 0, 2)
    assert (found.kv_usage, found.block_size, found.num_blocks) == (0.3, 16, 10)


async def test_loaded_and_waiting_adapters() -> None:
    async with running_server() as server:
        for task_id in ("b", "a", "c"):
            await register(server, task_id, task_id)
        server.engine.without_slot.add("sha256:c")
        server.engine.waiting_adapters = ("c@1", "a@7")
        found = await scraped(server)
    assert (found.max_adapters, found.running, found.waiting) == (4, {"a", "b"}, {"c", "a@7"})
    assert [found.affinity(name) for name in ("a", "c", "d")] == [1.0, 0.6, 0.0]


async def test_a_replica_with_an_inactive_version_alone_has_not_its_task() -> None:
    async with running_server() as server:
        await register(server, "sql", "a")
        await register(server, "sql", "b")
        both = await scraped(server)
        del server.engine.resident["sha256:b"]
        old = await scraped(server)
        await server.adapters.ActivateAdapter(adapter_pb2.ActivateAdapterRequest(task_id="sql@1"))
        back = await scraped(server)
    assert both.running == {"sql", "sql@1"}
    assert (old.running, old.affinity("sql")) == ({"sql@1"}, 0.8)
    assert "sql" in back.running
    assert "sql@1" not in back.running
