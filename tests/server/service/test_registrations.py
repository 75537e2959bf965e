"""Changes of the store come to their end, whoever asked for them and has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from manyhats.adapters.registration import Registration, Uri
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.registrations import Registrations
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


def _counted(metrics: Metrics) -> dict[str, float]:
    """Versions by state, as far as there are any."""
    samples = [sample for metric in metrics.registry.collect() for sample in metric.samples]
    return {
        sample.labels["state"]: sample.value
        for sample in samples
        if sample.name == "manyhats_adapters" and sample.value
    }
