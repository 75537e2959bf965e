"""Changes of the store come to their end, whoever asked for them and has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from manyhats.adapters.errors import StoreUnavailableError
from manyhats.adapters.registration import Files, Registration, Uri
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.registrations import Registrations
from manyhats.server.service.store_health import StoreUse
from support.fakes.server import EchoEngine, MemoryStore, eventually, make_backend

Change = Callable[[Registrations], Coroutine[Any, Any, Any]]
# Each on a task with an inactive version of "a", and then an active one of "b": what is active at last, and how many.
CHANGES: dict[str, tuple[Change, str, int]] = {
    "register": (lambda changes: changes.register(Registration("hats", Uri("c"))), "sha256:c", 2),
    "activate": (lambda changes: changes.activate("hats@1"), "sha256:a", 1),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_a_change_whose_caller_leaves_is_carried_through(name: str) -> None:
    change, active, num_inactive = CHANGES[name]
    engine, store, metrics = EchoEngine(), MemoryStore(), Metrics(max_task_labels=10)
    changes = Registrations(make_backend(engine, store), metrics)
    for uri in ("a", "b"):
        await changes.register(Registration("hats", Uri(uri)))
    engine.warm_s, engine.warmed = 0.1, []
    calling = asyncio.create_task(change(changes))
    await eventually(lambda: bool(engine.warmed))
    calling.cancel()
    await asyncio.wait({calling})
    assert calling.cancelled()
    await eventually(lambda: store.resolve("hats").digest == active)
    await eventually(lambda: _counted(metrics) == {"active": 1.0, "inactive": num_inactive})
    assert active in engine.resident


async def test_an_upload_that_is_opened_after_its_caller_was_refused_is_removed() -> None:
    """The store hangs as it is opened: its caller is told to try again, and what comes of it later is nobody's."""
    store = MemoryStore()
    backend = make_backend(EchoEngine(), store)
    changes = Registrations(backend, Metrics(max_task_labels=10))
    registration = Registration("hats", Files(()))
    store.may_open.clear()
    opening = asyncio.create_task(changes.open_upload(registration))
    await eventually(lambda: backend.store_health.is_busy)
    backend.store_health.hangs(StoreUse.WRITE)
    with pytest.raises(StoreUnavailableError, match="try again"):
        await opening
    with pytest.raises(StoreUnavailableError):
        await changes.open_upload(registration)
    store.may_open.set()
    await eventually(lambda: [upload.is_aborted for upload in store.uploads] == [True])
    backend.store_health.works(StoreUse.WRITE)
    session = await changes.open_upload(registration)
    backend.store_health.hangs(StoreUse.WRITE)
    await changes.abort_upload(session)
    await eventually(lambda: [upload.is_aborted for upload in store.uploads] == [True, True])
    assert not backend.store_health.is_busy


def _counted(metrics: Metrics) -> dict[str, float]:
    """Versions by state, as far as there are any."""
    samples = [sample for metric in metrics.registry.collect() for sample in metric.samples]
    return {
        sample.labels["state"]: sample.value
        for sample in samples
        if sample.name == "manyhats_adapters" and sample.value
    }
