"""Servers that share a store: what one changes, the others serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from manyhats.adapters.errors import AdapterInvalidError, StoreUnavailableError
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.server.service.following import StoreFollower
from manyhats.server.service.registrations import Registrations
from manyhats.v1 import adapter_pb2 as pb
from manyhats.v1 import generation_pb2
from support.factories.adapters import make_base, make_lora
from support.fakes.server import Running, eventually, make_backend, make_record, refused, running_server

BASE = make_base()


@asynccontextmanager
async def following(server: Running, period_s: float = 0.05) -> AsyncIterator[None]:
    """Follows the server's store, as its process does."""
    backend = make_backend(server.engine, server.store)
    registrations = Registrations(backend, server.metrics)
    registrations.count_all()
    task = asyncio.create_task(StoreFollower(backend, registrations, period_s=period_s).follow())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})


@asynccontextmanager
async def replica(tmp_path: Path) -> AsyncIterator[Running]:
    """A server on the one store of the test."""
    store = open_store(tmp_path / "store", BASE, [tmp_path])
    try:
        async with running_server(store=store) as server, following(server):
            yield server
    finally:
        store.close()


async def register(server: Running, source: Path, task_id: str = "hats", **fields: Any) -> pb.Adapter:
    request = pb.RegisterAdapterRequest(task_id=task_id, uri=str(source), **fields)
    return (await server.adapters.RegisterAdapter(request)).adapter


async def answering(server: Running, task_id: str = "hats") -> tuple[int, str]:
    """Version and digest of what answers."""
    request = generation_pb2.GenerateRequest(task_id=task_id, text="a")
    adapter = (await server.generation.Generate(request)).adapter
    return adapter.version, adapter.digest


def knows(server: Running, name: str) -> bool:
    return any(record.name == name for record in server.store.list().records)


def is_active(server: Running, name: str) -> bool:
    task_id, _, version = name.partition("@")
    return knows(server, name) and server.store.resolve(task_id).version == int(version)


def num_adapters(server: Running, state: str) -> float | None:
    """As the metrics have it: a server that follows counts after the store has changed."""
    return server.metrics.registry.get_sample_value("manyhats_adapters", {"state": state})


async def test_registration_activation_and_deletion_on_one_reach_the_other(tmp_path: Path) -> None:
    first, second = (make_lora(tmp_path / name, BASE, seed=seed) for seed, name in enumerate("ab"))
    async with replica(tmp_path) as one, replica(tmp_path) as other:
        registered = await register(one, first)
        await eventually(lambda: knows(other, "hats@1"))
        assert await answering(other) == (1, registered.digest)
        await eventually(lambda: num_adapters(other, "active") == 1)
        # The other way round.
        await register(other, second)
        await eventually(lambda: is_active(one, "hats@2"))
        await eventually(lambda: (num_adapters(one, "active"), num_adapters(one, "inactive")) == (1, 1))
        await other.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        await eventually(lambda: is_active(one, "hats@1"))
        assert await answering(one) == (1, registered.digest)
        await one.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats"))
        await eventually(lambda: not knows(other, "hats@1"))
        refusal = await refused(
            other.generation.Generate(generation_pb2.GenerateRequest(task_id="hats", text="a"))
        )
        assert refusal.reason == "TASK_NOT_FOUND"
        await eventually(lambda: num_adapters(other, "active") == 0)


async def test_servers_that_register_at_once_give_every_version_its_number(tmp_path: Path) -> None:
    sources = [make_lora(tmp_path / str(seed), BASE, rank=1, seed=seed) for seed in range(6)]
    async with replica(tmp_path) as one, replica(tmp_path) as other:
        adapters = await asyncio.gather(
            *(register((one, other)[index % 2], source) for index, source in enumerate(sources))
        )
        assert sorted(adapter.version for adapter in adapters) == [1, 2, 3, 4, 5, 6]
        for server in (one, other):
            await eventually(lambda server=server: len(server.store.list().records) == 6)


async def test_swapped_task_that_is_loaded_here_is_loaded_anew_and_the_old_one_goes(tmp_path: Path) -> None:
    first, second = (make_lora(tmp_path / name, BASE, seed=seed) for seed, name in enumerate("ab"))
    async with replica(tmp_path) as one, replica(tmp_path) as other:
        old = await register(one, first)
        await register(one, second, "cold")
        await eventually(lambda: knows(other, "hats@1") and knows(other, "cold@1"))
        await other.engine.warm_adapter(other.store.resolve("hats"))
        new = await register(one, second)
        await eventually(lambda: new.digest in other.engine.resident)
        # The task that nobody called here was not loaded: both have the same bytes, and only hats is the reason.
        assert [record.task_id for record in other.engine.warmed] == ["hats", "hats"]
        await one.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats@1"))
        await eventually(lambda: other.engine.resident_digests() == {new.digest})
        assert old.digest != new.digest


async def test_restarted_server_has_its_tasks(tmp_path: Path) -> None:
    sources = [make_lora(tmp_path / name, BASE, seed=seed) for seed, name in enumerate("ab")]
    async with replica(tmp_path) as server:
        adapters = [await register(server, source, labels={"n": source.name}) for source in sources]
        await server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
    async with replica(tmp_path) as server:
        listed = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert [(each.version, each.digest, dict(each.labels)) for each in listed.adapters] == [
            (1, adapters[0].digest, {"n": "a"}),
            (2, adapters[1].digest, {"n": "b"}),
        ]
        assert await answering(server) == (1, adapters[0].digest)
        assert (num_adapters(server, "active"), num_adapters(server, "inactive")) == (1, 1)
        refusal = await refused(
            server.generation.Generate(generation_pb2.GenerateRequest(task_id="x", text="a"))
        )
        assert refusal.reason == "TASK_NOT_FOUND"


@pytest.mark.parametrize("error", [StoreUnavailableError("catalogue", "cannot be read"), RuntimeError("bug")])
async def test_unreachable_store_is_logged_once_and_known_tasks_are_served_on(error: Exception) -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        server.store.refresh_error = error
        with capture_logs() as logs:
            async with following(server, 0.01):
                await eventually(lambda: bool(logs))
                assert (await answering(server)) == (1, "sha256:a")
                await asyncio.sleep(0.1)  # several looks
                server.store.tasks["caps"] = [make_record("caps")]
                server.store.others_changed = {"caps"}
                server.store.refresh_error = None
                await eventually(lambda: num_adapters(server, "active") == 2)
    events = [line["event"] for line in logs if line["event"].startswith("store")]
    assert events == ["store lost; what is in memory is served on", "store works again"]


async def test_new_version_that_cannot_be_loaded_does_not_stop_the_following() -> None:
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        await server.engine.warm_adapter(server.store.resolve("hats"))
        server.engine.warm_error = AdapterInvalidError("x", "is damaged")
        async with following(server, 0.01):
            server.store.register(Registration("hats", Uri("b")))
            server.store.others_changed = {"hats"}
            await eventually(lambda: len(server.engine.warmed) == 2)
            server.store.tasks["caps"] = [make_record("caps")]
            server.store.others_changed = {"caps"}
            await eventually(lambda: num_adapters(server, "active") == 2)
