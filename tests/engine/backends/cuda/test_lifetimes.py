"""No memory of adapters or steps is freed, rewritten or read too early, in any order that streams and threads allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import numpy as np
import pytest
import torch

from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.memory import ArenaMemory
from manyhats.engine.backends.cuda.adapters.packed import PackedAdapter
from manyhats.engine.backends.cuda.arena import ALIGNMENT
from manyhats.engine.backends.cuda.choosing.logits import Finisher
from manyhats.engine.backends.cuda.choosing.wanted import Bytes
from manyhats.engine.backends.cuda.exchange import Exchange
from manyhats.engine.residency import tiers
from manyhats.engine.residency.tiers import DeviceTier, PlacedAdapter
from support.fakes.adapter_memory import Copier
from support.fakes.fake_runtime import FakeRuntime, LifetimeError

NUM_SCHEDULES, NUM_PARTS = 10_000, 10
NUM_SLOTS, NUM_UNITS, NUM_ACTIONS = 3, 6, 16
WORDS = 3
ADDRESS, LENGTH, VALUE = range(WORDS)
PROBE = NUM_SLOTS + 1


def packed_adapter(value: int, num_units: int) -> PackedAdapter:
    """An adapter whose numbers are all the same."""
    length = num_units * ALIGNMENT - 100
    numbers = torch.full((length,), value, dtype=torch.uint8)
    record = np.array([0, length, value], np.int64)
    return PackedAdapter(numbers, record, np.array([ADDRESS]), Acting(), None)


class Slots:
    """``AdapterSlots`` with the memory of CUDA's, which say when a region is freed."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.memory = ArenaMemory(
            PROBE + 1,
            WORDS,
            NUM_UNITS * ALIGNMENT,
            runtime,
            copy_bytes=ALIGNMENT,  # an adapter is several copies
        )
        self._runtime = runtime

    def place(self, slot: int, packed: PackedAdapter) -> None:
        self.memory.put(slot, packed)

    def clear(self, slot: int) -> None:
        region = self.memory._regions.get(slot)
        if region is not None:
            self._runtime.check_unnamed(self.memory.buffer[region.begin : region.end])
        self.memory.take_back(slot)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a step: its number, over and over."""

    number: int
    num_bytes: int

    def write(self, array: Bytes) -> None:
        array[: self.num_bytes] = self.number


@dataclass(eq=False)
class Request:
    """A sequence that runs so many steps on an adapter."""

    adapter: PlacedAdapter
    num_left: int
    slot: int = 0


@dataclass(eq=False)
class Step:
    """A step that is launched and not collected."""

    number: int
    exchange: Exchange
    values: list[int]
    requests: list[Request]
    leaving: list[Request] = field(default_factory=list)


class World:
    """A tier, slots and a finisher on a fake device, and an engine that runs one step ahead."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.runtime = FakeRuntime(seed)
        self.slots = Slots(self.runtime)
        self.copier = Copier()
        self.tier = DeviceTier(cast(AdapterSlots[Any], self.slots), NUM_SLOTS, self.copier)
        self.finisher = Finisher(cast(Any, None), self.runtime, room=32)
        self.adapters = [
            PlacedAdapter(self.tier, packed_adapter(value, random.randint(1, 3))) for value in range(1, 6)
        ]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.in_flight: list[Step] = []
        self.num_steps = self.num_collected = 0
        self.is_copying = False

    def run(self) -> None:
        """Do anything for a while, then let everything end."""
        for _ in range(NUM_ACTIONS):
            self.act()
        while self.waiting or self.running or self.in_flight or self.copier.num_tasks:
            self.turn()
            self.copy()
        self.runtime.finish()
        if self.runtime.fault is not None:
            raise self.runtime.fault
        assert all(adapter.num_running == 0 for adapter in self.adapters)

    def act(self) -> None:
        choice = self.random.random()
        if choice < 0.25:
            self.arrive()
        elif choice < 0.65:
            self.turn()
        elif choice < 0.8:
            self.copy()
        elif choice < 0.88:
            self.cancel()
        elif choice < 0.94:
            self.replace()
        else:
            self.probe()

    def arrive(self) -> None:
        self.waiting.append(Request(self.random.choice(self.adapters), self.random.randint(1, 4)))

    def copy(self) -> None:
        """The copier works; while it waits for the device, the engine goes on."""
        if self.is_copying:
            return
        self.is_copying = True
        self.runtime.on_wait = self.meanwhile
        self.copier.work()
        self.runtime.on_wait = lambda: None
        self.is_copying = False

    def meanwhile(self) -> None:
        self.runtime.on_wait = lambda: None  # the engine's own waits
        for _ in range(self.random.randint(0, 3)):
            self.random.choice((self.turn, self.turn, self.arrive, self.cancel, self.drop))()

    def turn(self) -> None:
        """Admit, launch, then collect the step before."""
        for request in list(self.waiting):
            slot = request.adapter.place() if request.adapter.can_place() else None
            if slot is not None:
                request.slot = slot
                self.waiting.remove(request)
                self.running.append(request)
        if self.running:
            self.launch(self.running)
        if len(self.in_flight) > 1 or not self.running:
            self.collect()

    def launch(self, requests: Sequence[Request]) -> None:
        self.num_steps += 1
        number, num_bytes = self.num_steps % 200, self.random.randint(1, 90)
        exchange = self.finisher.upload(cast(Any, Wanted(number, num_bytes)))
        self.finisher.make_room(len(requests) + 1)
        rows = [(request.slot, int(request.adapter.packed.record[VALUE])) for request in requests]
        self.kernel(rows, number, num_bytes)
        self.finisher.download(exchange, len(requests) + 1)
        step = Step(number, exchange, [value for _, value in rows], list(requests))
        self.in_flight.append(step)
        for request in step.requests:
            request.num_left -= 1
            if not request.num_left:
                self.end(request)

    def kernel(self, rows: Sequence[tuple[int, int]], number: int, num_bytes: int) -> None:
        """What a step's kernels do: each row reads its slot's record, and where that points."""
        memory, regions = self.slots.memory, self.slots.memory._regions
        records, buffer = memory.records, memory.buffer
        wants, found = self.finisher.wants[:num_bytes], self.finisher.found[: len(rows) + 1]
        given, there, table = wants.numpy(), found.numpy(), records.numpy()
        numbers, first = buffer.numpy(), buffer.data_ptr()

        def run() -> None:
            assert (given == number).all()
            there[0] = number
            for index, (slot, value) in enumerate(rows, start=1):
                begin, length, kept = (int(word) for word in table[slot])
                region = numbers[begin - first : begin - first + length]
                assert kept == value, "another adapter's record"
                assert (region == value).all(), "another adapter's numbers"
                there[index] = region[-1]

        read = [wants, *(records[slot] for slot, _ in rows)]
        read += [buffer[regions[slot].begin : regions[slot].end] for slot, _ in rows if slot in regions]
        self.runtime.launch(run, read, [found])

    def collect(self) -> None:
        if not self.in_flight:
            return
        step = self.in_flight.pop(0)
        found = self.finisher.collect(step.exchange, lambda array: array[: len(step.values) + 1].copy())
        assert list(found) == [step.number, *step.values]
        self.num_collected += 1
        for request in step.leaving:
            request.adapter.leave()

    def end(self, request: Request) -> None:
        """A sequence runs no more; its slot is left once the last step that names it is collected."""
        self.running = [each for each in self.running if each is not request]
        last = next((step for step in reversed(self.in_flight) if request in step.requests), None)
        if last is None:
            request.adapter.leave()
        else:
            last.leaving.append(request)

    def cancel(self) -> None:
        chosen = self.random.choice([*self.waiting, *self.running, None])
        if chosen in self.waiting:
            self.waiting.remove(chosen)
        elif chosen is not None:
            self.end(chosen)

    @property
    def droppable(self) -> list[PlacedAdapter]:
        held = {each.adapter for each in (*self.waiting, *self.running)}
        held |= {each.adapter for step in self.in_flight for each in step.requests}
        return [adapter for adapter in self.adapters if adapter not in held]

    def drop(self) -> PlacedAdapter | None:
        """An adapter that no request holds leaves the host's memory, and another comes."""
        droppable = self.droppable
        if not droppable:
            return None
        adapter = self.random.choice(droppable)
        self.tier.remove(adapter)
        self.adapters.remove(adapter)
        value = 6 + self.num_steps % 200
        new = PlacedAdapter(self.tier, packed_adapter(value, self.random.randint(1, 3)))
        self.adapters.append(new)
        return new

    def replace(self) -> None:
        """A new one takes the place of an adapter, and room on the device if there is any."""
        new = self.drop()
        if new is not None:
            self.tier.fill_free(new)

    def probe(self) -> None:
        """An adapter in a slot of its own, for one step."""
        adapter = PlacedAdapter(self.tier, packed_adapter(250, 1))
        try:
            with self.tier.holding(PROBE, adapter.packed):
                request = Request(adapter, 2, PROBE)
                self.launch([*self.running, request])
                while self.in_flight:
                    self.collect()
        except tiers.AdapterCapacityError:
            pass


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that finds no room does not wait for some."""
    monkeypatch.setattr(tiers, "_MAX_WAIT_S", 0.0)


def run_schedule(seed: int) -> World:
    world = World(seed)
    try:
        world.run()
    except BaseException as error:
        raise AssertionError(f"schedule {seed}: {error}") from error
    return world


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_nothing_is_touched_too_early_in_thousands_of_schedules(part: int) -> None:
    size = NUM_SCHEDULES // NUM_PARTS
    num_steps = num_evictions = 0
    for seed in range(part * size, (part + 1) * size):
        world = run_schedule(seed)
        assert world.num_collected == world.num_steps
        num_steps += world.num_steps
        num_evictions += world.tier.num_evictions
    assert num_steps > 5 * size
    assert num_evictions > size // 2


MUTATIONS = 200
"""Schedules among which a mistake must show."""


def shows() -> bool:
    for seed in range(MUTATIONS):
        try:
            World(seed).run()
        except LifetimeError:
            return True
    return False


def test_a_slot_left_before_its_last_step_is_collected_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(world: World, request: Request) -> None:
        world.running = [each for each in world.running if each is not request]
        request.adapter.leave()

    monkeypatch.setattr(World, "end", end)
    assert shows()


def test_a_step_s_memory_given_to_another_before_it_is_collected_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    download = Finisher.download

    def too_early(finisher: Finisher, exchange: Exchange, num_bytes: int) -> None:
        download(finisher, exchange, num_bytes)
        finisher._idle.append(exchange)

    monkeypatch.setattr(Finisher, "download", too_early)
    assert shows()


def test_what_was_found_and_is_read_without_waiting_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "wait", lambda exchange: None)
    assert shows()


def test_a_slot_that_is_nameable_before_its_copy_is_there_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = ArenaMemory._copy

    def unawaited(memory: ArenaMemory, slot: int, packed: PackedAdapter, region: Any) -> None:
        memory._event.synchronize = lambda: None  # type: ignore[method-assign]
        copy(memory, slot, packed, region)

    monkeypatch.setattr(ArenaMemory, "_copy", unawaited)
    assert shows()


def test_a_region_given_away_while_a_step_reads_it_is_caught() -> None:
    runtime = FakeRuntime(0)
    memory = ArenaMemory(3, WORDS, 2 * ALIGNMENT, runtime)
    memory.put(1, packed_adapter(1, 2))
    runtime.launch(lambda: None, [memory.buffer])
    memory.take_back(1)
    with pytest.raises(LifetimeError):
        memory.put(2, packed_adapter(2, 1))
