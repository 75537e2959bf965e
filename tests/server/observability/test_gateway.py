"""What an inference gateway finds in ``/metrics``, read as its endpoint picker does."""

from __future__ import annotations

import asyncio
import urllib.request

from manyhats.v1 import adapter_pb2
from support.fakes.server import Running, running_server
from support.harnesses.picker import Endpoint, read_endpoint


async def scraped(server: Running) -> Endpoint:
    def get() -> str:
        with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    return read_endpoint(await asyncio.to_thread(get))


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
