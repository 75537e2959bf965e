"""Pins over a real port: what is loaded, refused, followed by other servers, shown and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from manyhats.adapters.errors import StoreUnavailableError
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.engine.errors import PinLimitError
from manyhats.server.service import following
from manyhats.server.service.following import StoreFollower
from manyhats.server.service.registrations import Registrations
from manyhats.v1 import adapter_pb2 as pb
from support.factories.adapters import make_base, make_lora
from support.fakes.server import Running, eventually, make_backend, refused, running_server

BASE = make_base()


async def pin(server: Running, name: str) -> pb.Adapter:
    return (await server.adapters.PinAdapter(pb.PinAdapterRequest(task_id=name))).adapter


async def unpin(server: Running, name: str) -> pb.Adapter:
    return (await server.adapters.UnpinAdapter(pb.UnpinAdapterRequest(task_id=name))).adapter


async def register(server: Running, source: Path | str, task_id: str = "hats") -> pb.Adapter:
    request = pb.RegisterAdapterRequest(task_id=task_id, uri=str(source))
    return (await server.adapters.RegisterAdapter(request)).adapter


@asynccontextmanager
async def replica(tmp_path: Path) -> AsyncIterator[Running]:
    """A server on the one store of the test, which starts and follows as its process does."""
    store = open_store(tmp_path / "store", BASE, [tmp_path])
    try:
        async with running_server(store=store) as server:
            registrations = Registrations(make_backend(server.engine, store), server.metrics)
            registrations.count_all()
            await registrations.follow_pins()
            follower = StoreFollower(make_backend(server.engine, store), registrations, period_s=0.02)
            task = asyncio.create_task(follower.follow())
            yield server
            task.cancel()
            await asyncio.wait({task})
    finally:
        store.close()


def num_pinned(server: Running, task: str) -> float | None:
    return server.metrics.registry.get_sample_value("manyhats_adapter_pinned", {"task": task})


async def test_a_pinned_task_is_loaded_and_keeps_to_its_active_version(tmp_path: Path) -> None:
    sources = [make_lora(tmp_path / name, BASE, seed=seed) for seed, name in enumerate("ab")]
    async with replica(tmp_path) as server:
        first = await register(server, sources[0])
        server.engine.resident.clear()  # it made room for others
        pinned = await pin(server, "hats")
        assert (pinned.version, pinned.pinned) == (1, True)
        assert server.engine.resident_digests() == server.engine.pinned_digests() == {first.digest}
        assert num_pinned(server, "hats") == 1
        assert server.metrics.registry.get_sample_value("manyhats_adapter_pinned_bytes") == 1
        second = await register(server, sources[1])
        assert server.engine.pinned_digests() == {second.digest}
        await server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        assert server.engine.pinned_digests() == {first.digest}
        await pin(server, "hats@2")
        assert server.engine.pinned_digests() == {first.digest, second.digest}
        shown = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert [each.pinned for each in shown.adapters] == [True, True]
        assert not (await unpin(server, "hats")).pinned
        assert server.engine.pinned_digests() == frozenset()
        assert num_pinned(server, "hats") is None


async def test_pins_are_kept_by_other_servers_and_by_the_next_start(tmp_path: Path) -> None:
    source = make_lora(tmp_path / "a", BASE)
    async with replica(tmp_path) as one, replica(tmp_path) as other:
        adapter = await register(one, source)
        await pin(one, "hats")
        await eventually(lambda: other.engine.pinned_digests() == {adapter.digest})
        await eventually(lambda: num_pinned(other, "hats") == 1)
    async with replica(tmp_path) as again:
        assert again.engine.pinned_digests() == {adapter.digest}
        async with replica(tmp_path) as other:
            await unpin(again, "hats@1")  # of its name, not of its number
            assert again.engine.pinned_digests() == {adapter.digest}
            await again.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats"))
            assert again.engine.pinned_digests() == frozenset()
            await eventually(lambda: other.engine.pinned_digests() == frozenset())


async def test_versions_of_the_same_bytes_are_pinned_until_none_is(tmp_path: Path) -> None:
    source = make_lora(tmp_path / "a", BASE)
    async with replica(tmp_path) as server:
        digest = (await register(server, source)).digest
        await register(server, source, "caps")
        await pin(server, "hats")
        await pin(server, "caps@1")
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="hats"))
        assert server.engine.pinned_digests() == {digest}
        await unpin(server, "caps")
        assert server.engine.pinned_digests() == frozenset()


async def test_what_does_not_fit_is_refused_and_not_written() -> None:
    async with running_server() as server:
        await register(server, "a")
        server.engine.pin_error = PinLimitError(70, 50, 100)
        refusal = await refused(pin(server, "hats"))
        assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
        for number in ("70 bytes", "50 are pinned", "100 bytes"):
            assert number in refusal.message
        assert not server.store.pinned()
        server.engine.pin_error = None
        assert (await pin(server, "hats")).pinned


async def test_a_pin_that_cannot_be_written_does_not_hold() -> None:
    async with running_server() as server:
        await register(server, "a")
        error = StoreUnavailableError("catalogue", "cannot be written")
        server.store.set_pin = lambda name, *, is_pinned: (_ for _ in ()).throw(error)
        assert (await refused(pin(server, "hats"))).reason == "STORE_UNAVAILABLE"
        assert server.engine.pinned_digests() == frozenset()


async def test_names_that_are_none_are_refused() -> None:
    async with running_server() as server:
        await register(server, "a")
        for call in (pin, unpin):
            assert (await refused(call(server, "caps"))).reason == "TASK_NOT_FOUND"
            assert (await refused(call(server, "hats@2"))).reason == "TASK_NOT_FOUND"
            assert (await refused(call(server, "../x"))).reason == "FIELD_INVALID"


async def test_a_pin_without_room_is_no_matter_of_other_tasks_changes() -> None:
    async with running_server() as server:
        await register(server, "a")
        server.store.set_pin("hats", is_pinned=True)
        server.engine.pin_error = PinLimitError(70, 50, 100)
        await register(server, "b", "caps")
        await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(task_id="caps"))
        assert server.engine.asked_to_pin == []
        await server.adapters.ActivateAdapter(pb.ActivateAdapterRequest(task_id="hats@1"))
        assert server.engine.asked_to_pin == ["hats@1"]


async def test_a_start_goes_on_without_what_cannot_be_pinned_and_does_not_ask_a_lost_store_for_each() -> None:
    async with running_server() as server:
        for task in ("a", "b", "c"):
            server.store.register(Registration(task, Uri(task)))
            server.store.set_pin(task, is_pinned=True)
        registrations = Registrations(make_backend(server.engine, server.store), server.metrics)
        for error, num_asked in (
            (RuntimeError("bug"), 3),
            (PinLimitError(70, 50, 100), 3),
            (StoreUnavailableError("store", "cannot be reached"), 1),
        ):
            server.engine.pin_error, server.engine.asked_to_pin = error, []
            await registrations.follow_pins()
            assert len(server.engine.asked_to_pin) == num_asked


async def test_a_pin_for_which_there_was_no_room_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_PINS_PERIOD_S", 0.05)
    async with running_server() as server:
        server.store.register(Registration("hats", Uri("a")))
        server.store.set_pin("hats", is_pinned=True)
        server.engine.pin_error = PinLimitError(70, 50, 100)
        backend = make_backend(server.engine, server.store)
        follower = StoreFollower(backend, Registrations(backend, server.metrics), period_s=0.01)
        task = asyncio.create_task(follower.follow())
        await asyncio.sleep(0.1)
        assert server.engine.pinned_digests() == frozenset()
        server.engine.pin_error = None
        await eventually(lambda: server.engine.pinned_digests() == {"sha256:a"})
        task.cancel()
        await asyncio.wait({task})
