"""Artifacts that are far: fetched in order, several at a time, before they queue to be loaded."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.errors import DrainingError
from manyhats.engine.residency.loading import MAX_FETCHES, AdapterLoading
from manyhats.engine.residency.residency import AdapterResidency
from support.harnesses.engine import digest_of, make_record, until


class NoSlots:
    """Slots of adapters that have no numbers."""

    memory = None

    def pack(self, adapter: LoweredAdapter) -> Any:
        return SimpleNamespace(num_bytes=1)

    def place(self, slot: int, packed: Any) -> None: ...

    def clear(self, slot: int) -> None: ...


class Network:
    """Fetches of tasks that are far begin, and end once they may."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: set[str] = set()
        self.may_end: dict[str, threading.Event] = {}
        self.loaded: list[str] = []
        residency = AdapterResidency(
            cast(AdapterSlots[Any], NoSlots()), 4, 100, self.load, 32, lambda virtual: None
        )
        self.loading = AdapterLoading(residency, self.fetch)

    def fetch(self, record: AdapterRecord) -> None:
        task = record.task_id
        if not task.startswith("far"):
            return
        self.begun.append(task)
        assert self.may_end.setdefault(task, threading.Event()).wait(20)
        if task == "far and away":
            raise OSError("no network")
        self.ended.add(task)

    def load(self, record: AdapterRecord) -> LoweredAdapter:
        task = record.task_id
        if task == "far and away":
            raise ValueError("not there")
        assert not task.startswith("far") or task in self.ended, "it would wait for the network"
        self.loaded.append(task)
        return LoweredAdapter(record.digest, ())

    def let(self, *tasks: str) -> None:
        for task in tasks:
            self.may_end.setdefault(task, threading.Event()).set()

    async def use(self, task: str) -> None:
        (await self.loading.lease(make_record(task))).release()

    def asking(self, *tasks: str) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.use(task)) for task in tasks]


FAR = [f"far {index}" for index in range(2 * MAX_FETCHES)]


async def test_who_is_loaded_waits_for_no_network() -> None:
    network = Network()
    await network.use("near")
    calls = network.asking(*FAR)
    await until(lambda: len(network.begun) == MAX_FETCHES)
    await asyncio.wait_for(network.use("near"), 5)
    network.let(*FAR)
    await asyncio.wait_for(asyncio.gather(*calls), 20)
    assert sorted(network.loaded) == sorted([*FAR, "near"])
    network.loading.close()


async def test_fetches_begin_in_the_order_of_requests_and_a_few_at_a_time() -> None:
    network = Network()
    calls = network.asking(*FAR, *FAR)
    await until(lambda: len(network.begun) == MAX_FETCHES)
    for index, task in enumerate(FAR):
        most = min(len(FAR), MAX_FETCHES + index)
        await until(lambda most=most: len(network.begun) == most)  # type: ignore[misc]
        assert sorted(network.begun) == sorted(FAR[:most])
        network.let(task)
    await asyncio.wait_for(asyncio.gather(*calls), 20)
    assert sorted(network.begun) == sorted(network.loaded) == sorted(FAR), "once for all who ask"
    network.loading.close()


async def test_what_nobody_waits_for_any_longer_is_not_fetched() -> None:
    network = Network()
    *kept, left = network.asking(*FAR[: MAX_FETCHES + 1])
    await until(lambda: len(network.begun) == MAX_FETCHES)
    left.cancel()
    await asyncio.wait([left])
    (more,) = network.asking(FAR[-1])
    network.let(*FAR)
    await asyncio.wait_for(asyncio.gather(*kept, more), 20)
    assert FAR[MAX_FETCHES] not in network.begun
    assert network.loading.num_waiting == 0
    network.loading.close()


async def test_who_leaves_takes_nothing_from_others_who_wait_for_the_same() -> None:
    network = Network()
    first, second = network.asking("far 0", "far 0")
    await until(lambda: network.begun == ["far 0"])
    first.cancel()
    await asyncio.wait([first])
    network.let("far 0")
    await asyncio.wait_for(second, 20)
    assert digest_of("far 0") in network.loading.residency.tiers()
    network.loading.close()


async def test_a_fetch_that_fails_is_told_by_the_load() -> None:
    network = Network()
    network.let("far and away")
    with pytest.raises(ValueError, match="not there"):
        await network.use("far and away")
    network.loading.close()


async def test_closing_ends_the_wait_for_fetches_that_have_not_begun() -> None:
    network = Network()
    calls = network.asking(*FAR)
    await until(lambda: len(network.begun) == MAX_FETCHES)
    network.loading.close()
    network.let(*FAR)
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
    assert all(isinstance(each, DrainingError) for each in results)
