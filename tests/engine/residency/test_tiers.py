"""Which sequences run in which slots: any arrivals, steps, pauses and losses, against what must always hold."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.residency.tiers import DeviceTier, PlacedAdapter, Tier
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from support.fakes.adapter_memory import Copier
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence

BLOCK_SIZE = 3


class WatchedSlots:
    """``AdapterSlots`` that know which of them the step at hand names."""

    memory = None

    def __init__(self) -> None:
        self.held: dict[int, object] = {}
        self.named: set[int] = set()

    def place(self, slot: int, packed: object) -> None:
        assert slot > 0, "slot 0 is the base model"
        assert slot not in self.held, "written over"
        assert slot not in self.named, "a step that names it is left to run"
        self.held[slot] = packed

    def clear(self, slot: int) -> None:
        assert slot not in self.named, "a step that names it is left to run"
        del self.held[slot]


class Device:
    """A device tier, its slots, and adapters by number."""

    def __init__(self, num_slots: int, num_adapters: int = 0) -> None:
        self.slots = WatchedSlots()
        self.tier = DeviceTier(cast(AdapterSlots[Any], self.slots), num_slots, Copier())
        self.adapters = [self.adapter(number) for number in range(num_adapters)]

    def adapter(self, number: int) -> PlacedAdapter:
        return PlacedAdapter(self.tier, cast(Any, f"adapter {number}"))


def test_the_slot_that_was_idle_for_longest_goes_to_another() -> None:
    device = Device(2, 4)
    a, b, c, d = device.adapters
    assert (a.place(), b.place()) == (1, 2)
    assert not c.can_place()
    assert c.place() is None
    b.leave()
    a.leave()
    assert c.can_place()
    assert c.place() == 2
    assert (b.current, a.current, c.current) == (Tier.HOST, Tier.DEVICE, Tier.DEVICE)
    assert a.place() == 1, "it is there still"
    assert d.place() is None
    assert device.tier.num_evictions == 1
    assert device.slots.held == {1: "adapter 0", 2: "adapter 2"}


def test_a_slot_is_kept_for_the_last_sequence_that_runs_on_it() -> None:
    device = Device(1, 2)
    a, b = device.adapters
    assert (a.place(), a.place()) == (1, 1)
    a.leave()
    assert b.place() is None
    a.leave()
    assert b.place() == 1


def test_a_new_adapter_takes_a_free_slot_and_nobody_s() -> None:
    device = Device(1, 2)
    a, b = device.adapters
    device.tier.fill_free(a)
    device.tier.fill_free(b)
    assert device.slots.held == {1: "adapter 0"}
    device.tier.remove(a)
    assert device.slots.held == {}
    device.tier.fill_free(b)
    assert device.slots.held == {1: "adapter 1"}
    device.tier.remove(a)
    assert device.slots.held == {1: "adapter 1"}


def run(device: Device, name: str, adapter: int | None, new: int, **fields: Any) -> Sequence:
    placement = None if adapter is None else device.adapters[adapter]
    return make_sequence(name, [1, 2, 0], new, cache_key=str(adapter).encode(), placement=placement, **fields)


def test_a_third_adapter_on_two_slots_waits_without_one_and_then_runs() -> None:
    scheduler, device = make_scheduler(), Device(2, 3)
    engine = ToyEngine(scheduler)
    first, second, third = (run(device, str(number), number, 4 + 4 * number) for number in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    engine.step()
    assert third.status is SequenceStatus.WAITING
    assert device.adapters[2].slot is None
    while not first.is_finished:
        engine.step()
    engine.step()
    assert third.status is SequenceStatus.RUNNING
    assert third.slot == first.slot
    engine.drain()


@pytest.mark.parametrize("how", ["preempted", "paused"])
def test_a_sequence_that_stops_running_gives_its_slot_away_and_comes_back_on_another(how: str) -> None:
    device = Device(2, 3)
    scheduler = make_scheduler(num_blocks=5 if how == "preempted" else 64)
    engine = ToyEngine(scheduler)
    kept, moved, other = (
        run(device, str(number), number, new, arrival=float(number)) for number, new in enumerate((9, 9, 3))
    )
    other.priority = 1
    for sequence in (kept, moved):
        scheduler.add(sequence)
    engine.step()
    assert (kept.slot, moved.slot) == (1, 2)
    if how == "paused":
        scheduler.pause(moved)
    scheduler.add(other)
    while not (moved.num_preemptions and other.status is SequenceStatus.RUNNING):
        engine.step()
    assert other.slot == 2
    assert device.adapters[1].slot is None
    scheduler.finish(kept)
    if how == "paused":
        scheduler.resume(moved)
    while moved.status is not SequenceStatus.RUNNING:
        engine.step()
    assert moved.slot == 1
    engine.drain()
    assert moved.num_tokens == moved.max_num_tokens


def test_newcomers_on_placed_adapters_do_not_keep_one_that_waits_out_for_good() -> None:
    device, scheduler = Device(1, 2), make_scheduler(sequences=4)
    engine = ToyEngine(scheduler)
    scheduler.add(run(device, "first", 0, 6))
    engine.step()
    waiting = run(device, "waiting", 1, 3)
    scheduler.add(waiting)
    num_steps = 0
    while waiting.status is SequenceStatus.WAITING:
        scheduler.add(run(device, f"newcomer {num_steps}", 0, 6))
        engine.step()
        num_steps += 1
        assert num_steps < 150
    assert waiting.num_passed == 0
    assert num_steps > 32, "they went ahead at first"


def test_who_needs_no_slot_does_not_wait_behind_those_who_do() -> None:
    device, scheduler = Device(1, 60), make_scheduler(sequences=4)
    engine = ToyEngine(scheduler)
    holder = run(device, "holder", 0, 100)
    scheduler.add(holder)
    engine.step()
    for number in range(1, 60):
        scheduler.add(run(device, f"waiting {number}", number, 1))
    for number in range(40):
        base = run(device, f"base {number}", None, 1)
        scheduler.add(base)
        engine.step()
        engine.step()
        assert base.is_finished
    assert not holder.is_finished
    assert scheduler.num_waiting == 59


class PlacementMachine(RuleBasedStateMachine):
    """Sequences of several adapters on few slots and few blocks."""

    @initialize(num_slots=st.integers(1, 3), num_blocks=st.integers(7, 14), sequences=st.integers(1, 5))
    def start(self, num_slots: int, num_blocks: int, sequences: int) -> None:
        self.device = Device(num_slots, 5)
        self.scheduler: Scheduler = make_scheduler(num_blocks, BLOCK_SIZE, sequences=sequences, tokens=12)
        self.engine = ToyEngine(self.scheduler)
        self.live: list[Sequence] = []
        self.num_added = 0

    @precondition(lambda self: self.num_added < 40)
    @rule(
        adapter=st.none() | st.integers(0, 4),
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=8),
        new=st.integers(0, 8),
        priority=st.integers(0, 1),
    )
    def arrive(self, adapter: int | None, tokens: list[int], new: int, priority: int) -> None:
        placement = None if adapter is None else self.device.adapters[adapter]
        sequence = make_sequence(
            str(self.num_added),
            tokens,
            new,
            cache_key=str(adapter).encode(),
            priority=priority,
            placement=placement,
        )
        self.num_added += 1
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @rule(data=st.data(), meanwhile=st.sampled_from(["nothing", "finish", "pause", "load"]))
    def step(self, data: st.DataObject, meanwhile: str) -> None:
        slots = self.device.slots

        def during(schedule: Schedule) -> None:
            slots.named = {chunk.sequence.slot for chunk in schedule.chunks} - {0}
            for chunk in schedule.chunks:
                placement = chunk.sequence.placement
                if isinstance(placement, PlacedAdapter):
                    assert slots.held[chunk.sequence.slot] == placement.packed
            if meanwhile == "load":
                self.device.tier.fill_free(self.device.adapter(99))
            elif meanwhile == "finish" and self.live:
                self.scheduler.finish(data.draw(st.sampled_from(self.live)))

        self.engine.step(during)
        slots.named = set()
        self.live = [sequence for sequence in self.live if not sequence.is_finished]
        if meanwhile == "pause" and self.live:
            self.scheduler.pause(data.draw(st.sampled_from(self.live)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self.scheduler.resume(data.draw(st.sampled_from(self.live)))

    @precondition(lambda self: any(not adapter.num_running for adapter in self.device.adapters))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """As when the host's memory has no more room for it; a waiting sequence's would be leased."""
        idle = [adapter for adapter in self.device.adapters if not adapter.num_running]
        self.device.tier.remove(data.draw(st.sampled_from(idle)))

    @rule()
    def clear(self) -> None:
        self.scheduler.clear()
        self.live.clear()
        assert all(adapter.num_running == 0 for adapter in self.device.adapters)

    @invariant()
    def slots_are_told_apart_and_counted(self) -> None:
        if not hasattr(self, "device"):
            return
        taken = [adapter.slot for adapter in self.device.adapters if adapter.slot is not None]
        assert len(set(taken)) == len(taken)
        running = [each for each in self.live if each.status is SequenceStatus.RUNNING]
        for adapter in self.device.adapters:
            own = [each for each in running if each.placement is adapter]
            assert adapter.num_running == len(own)
            assert all(each.slot == adapter.slot for each in own)
            assert adapter.slot is None or self.device.slots.held[adapter.slot] == adapter.packed

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        for sequence in self.live:
            self.scheduler.resume(sequence)
        self.engine.drain()
        assert all(sequence.is_finished for sequence in self.live)
        assert all(adapter.num_running == 0 for adapter in self.device.adapters)


TestPlacementMachine = PlacementMachine.TestCase
TestPlacementMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
