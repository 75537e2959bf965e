"""Adapters that are copied to a device's own memory, beside steps, and what makes room for them there."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manyhats.adapters.errors import AdapterTooLargeError
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.errors import AdapterCapacityError
from manyhats.engine.residency import tiers
from manyhats.engine.residency.residency import AdapterResidency
from manyhats.engine.residency.tiers import DeviceBytes, DeviceTier, PlacedAdapter, Tier
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from support.fakes.adapter_memory import ArenaSlots, Copier, Units
from support.harnesses.engine import make_record
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence

RESERVED = 9


class Device:
    """A tier of slots with memory, a copier that waits for the test, and adapters of some sizes."""

    def __init__(self, num_slots: int, num_units: int, sizes: Seq[int]) -> None:
        self.slots = ArenaSlots(num_units)
        self.copier = Copier()
        self.num_wakes = 0
        self.tier = DeviceTier(cast(AdapterSlots[Any], self.slots), num_slots, self.copier, self._wake)
        self.adapters = [self.adapter(number, size) for number, size in enumerate(sizes)]

    def adapter(self, number: int, size: int) -> PlacedAdapter:
        return PlacedAdapter(self.tier, Units(f"adapter {number}", size))

    def place(self, adapter: PlacedAdapter) -> int:
        """Ask for a slot until it is there."""
        assert adapter.place() is None
        self.copier.work()
        slot = adapter.place()
        assert slot is not None
        return slot

    def _wake(self) -> None:
        self.num_wakes += 1


def run(device: Device, name: str, adapter: int | None, new: int, **fields: Any) -> Sequence:
    placement = None if adapter is None else device.adapters[adapter]
    return make_sequence(name, [1, 2, 0], new, cache_key=str(adapter).encode(), placement=placement, **fields)


def test_the_first_call_asks_for_a_copy_and_one_after_it_has_the_slot() -> None:
    device = Device(2, 4, [3])
    (adapter,) = device.adapters
    assert adapter.can_place()
    assert adapter.place() is None
    assert (adapter.can_place(), adapter.is_coming(), adapter.current) == (False, True, Tier.HOST)
    assert adapter.place() is None
    assert device.copier.num_tasks == 1, "asked for once"
    assert device.num_wakes == 0
    device.copier.work()
    assert (adapter.can_place(), adapter.is_coming(), adapter.current) == (True, True, Tier.DEVICE)
    assert device.num_wakes == 1
    assert (adapter.place(), adapter.place()) == (1, 1)
    assert device.copier.num_tasks == 0


def test_others_run_while_an_adapter_is_copied_and_its_sequence_starts_after_that() -> None:
    device, scheduler = Device(2, 4, [3]), make_scheduler()
    engine = ToyEngine(scheduler)
    base, tuned = run(device, "base", None, 9), run(device, "tuned", 0, 3)
    for sequence in (tuned, base):
        scheduler.add(sequence)
    for _ in range(3):
        assert [chunk.sequence for chunk in engine.step().chunks] == [base]
    assert not scheduler.is_held_back, "the base runs"
    device.copier.work()
    assert {chunk.sequence for chunk in engine.step().chunks} == {base, tuned}
    assert tuned.slot == 1
    engine.drain()


def test_a_lone_sequence_waits_for_its_copy_without_being_stuck() -> None:
    device, scheduler = Device(1, 4, [3]), make_scheduler()
    scheduler.add(run(device, "tuned", 0, 3))
    for _ in range(2):
        assert not scheduler.schedule().chunks
        assert scheduler.is_held_back
    device.copier.work()
    engine = ToyEngine(scheduler)
    assert engine.step().chunks
    engine.drain()
    assert not scheduler.is_held_back


def test_a_sequence_that_waits_behind_the_copy_of_one_that_is_gone_is_not_stuck() -> None:
    device, scheduler = Device(1, 4, [3, 3]), make_scheduler()
    first, second = run(device, "first", 0, 3), run(device, "second", 1, 3)
    scheduler.add(first)
    scheduler.schedule()
    scheduler.finish(first)
    scheduler.add(second)
    device.copier.work()
    assert not scheduler.schedule().chunks
    assert scheduler.is_held_back
    device.copier.work()
    assert device.slots.names == {1: "adapter 1"}
    ToyEngine(scheduler).drain()


def test_what_was_idle_for_longest_makes_room_until_an_adapter_fits() -> None:
    device = Device(8, 6, [2, 1, 3, 4])
    a, b, c, large = device.adapters
    for adapter in (a, b, c):
        device.place(adapter)
    assert device.slots.num_free_bytes == 0
    assert not large.can_place()
    a.leave()
    assert not large.can_place(), "two units are not enough, and the rest runs"
    assert large.place() is None
    device.copier.work()
    assert large.current is Tier.HOST
    assert a.current is Tier.DEVICE, "nothing makes room in vain"
    b.leave()
    c.leave()
    assert device.place(large) > 0
    assert [each.current for each in (a, b, c)] == [Tier.HOST] * 3
    assert device.tier.num_evictions == 3


def test_idle_adapters_elsewhere_stay_if_a_hole_is_large_enough_without_them() -> None:
    device = Device(8, 6, [1, 1, 2, 2, 3])
    a, gap, c, d, large = device.adapters
    for adapter in (a, gap, c, d):
        device.place(adapter)
    for adapter in (a, c, d):
        adapter.leave()
    device.place(large)
    assert a.current is Tier.DEVICE
    assert (c.current, d.current) == (Tier.HOST, Tier.HOST)


def test_a_full_device_takes_the_slot_of_one_that_is_idle_though_there_are_bytes() -> None:
    device = Device(1, 9, [1, 1])
    a, b = device.adapters
    device.place(a)
    assert not b.can_place()
    a.leave()
    assert device.place(b) == 1
    assert device.slots.names == {1: "adapter 1"}


def test_an_adapter_that_can_never_fit_is_refused_with_its_bytes_and_the_setting() -> None:
    device = Device(2, 4, [4, 5])
    fits, never = device.adapters
    device.tier.check_fits(fits.packed)
    with pytest.raises(AdapterTooLargeError, match=r"takes 1280 bytes .*--gpu-adapter-bytes is 1024"):
        device.tier.check_fits(never.packed)


def test_a_failed_copy_is_raised_where_the_slot_is_asked_for_and_the_next_may_succeed() -> None:
    device = Device(1, 4, [3])
    (adapter,) = device.adapters
    assert adapter.place() is None
    device.slots.fails = RuntimeError("the device is lost")
    device.copier.work()
    with pytest.raises(RuntimeError, match="the device is lost"):
        adapter.place()
    assert device.place(adapter) == 1


def test_an_adapter_that_is_dropped_during_its_copy_leaves_nothing_behind() -> None:
    device = Device(1, 4, [3, 3])
    dropped, other = device.adapters
    dropped.place()
    device.slots.on_copy = lambda: device.tier.remove(dropped)
    device.copier.work()
    device.slots.on_copy = lambda: None
    assert device.slots.held == {}
    assert device.place(other) == 1


def test_an_adapter_that_is_dropped_before_its_copy_is_not_copied() -> None:
    device = Device(1, 4, [3])
    device.adapters[0].place()
    device.tier.remove(device.adapters[0])
    device.copier.work()
    assert device.slots.num_copied_bytes == 0
    assert device.tier.num_bytes == DeviceBytes(used=0, free=1024, copied=0)


def test_a_new_adapter_takes_free_memory_and_nobody_s() -> None:
    device = Device(3, 4, [2, 3])
    first, second = device.adapters
    device.tier.fill_free(first)
    assert first.current is Tier.DEVICE
    device.tier.fill_free(second)
    assert (first.current, second.current) == (Tier.DEVICE, Tier.HOST)


def test_a_new_adapter_whose_copy_fails_is_an_error_of_its_load() -> None:
    device = Device(3, 4, [2])
    device.slots.fails = RuntimeError("the device is lost")
    with pytest.raises(RuntimeError, match="the device is lost"):
        device.tier.fill_free(device.adapters[0])


def test_a_held_slot_takes_the_room_of_idle_adapters_and_gives_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "_MAX_WAIT_S", 0.05)
    device = Device(1, 4, [3])
    (adapter,) = device.adapters
    device.tier.fill_free(adapter)
    assert adapter.place() == 1
    held = Units("held", 2)
    with pytest.raises(AdapterCapacityError, match="1024 bytes"), device.tier.holding(RESERVED, held):
        pass
    adapter.leave()
    with device.tier.holding(RESERVED, held):
        assert device.slots.names == {RESERVED: "held"}
        assert not adapter.can_place()
    assert device.slots.held == {}
    with pytest.raises(AdapterTooLargeError), device.tier.holding(RESERVED, Units("large", 5)):
        pass


def test_an_evicted_adapter_is_placed_again_without_being_read_or_packed() -> None:
    slots, counts = ArenaSlots(4), {"loads": 0, "packs": 0}

    def load(record: Any) -> LoweredAdapter:
        counts["loads"] += 1
        return LoweredAdapter(record.digest, ())

    def pack(adapter: LoweredAdapter) -> Units:
        counts["packs"] += 1
        return Units(adapter.digest, 3)

    slots.pack = pack  # type: ignore[attr-defined]
    residency = AdapterResidency(cast(AdapterSlots[Any], slots), 4, 10**6, load, 32, lambda virtual: None)
    leases = []
    for name in ("first", "second"):
        record = make_record(name)
        lease = residency.lease(record, lambda record=record: residency.fill(record))
        assert lease is not None
        leases.append(lease)
    placements = [lease.adapter.placement for lease in leases]
    for _ in range(3):
        for placement in placements:
            assert placement is not None
            while (slot := placement.place()) is None:
                pass
            assert list(slots.held) == [slot]
            placement.leave()
    assert counts == {"loads": 2, "packs": 2}
    assert slots.num_copied_bytes == 6 * Units("any", 3).num_bytes
    residency.close()


class CopyingMachine(RuleBasedStateMachine):
    """Sequences of adapters of several sizes; copies end whenever they like, in the middle of steps too."""

    @initialize(
        num_slots=st.integers(1, 4),
        num_units=st.integers(5, 9),
        sizes=st.lists(st.integers(1, 5), min_size=5, max_size=5),
        sequences=st.integers(1, 5),
    )
    def start(self, num_slots: int, num_units: int, sizes: list[int], sequences: int) -> None:
        self.device = Device(num_slots, num_units, sizes)
        self.scheduler: Scheduler = make_scheduler(14, 3, sequences=sequences, tokens=12)
        self.engine = ToyEngine(self.scheduler)
        self.live: list[Sequence] = []
        self.num_added = 0

    @precondition(lambda self: self.num_added < 30)
    @rule(adapter=st.none() | st.integers(0, 4), new=st.integers(0, 8), priority=st.integers(0, 1))
    def arrive(self, adapter: int | None, new: int, priority: int) -> None:
        sequence = run(self.device, str(self.num_added), adapter, new, priority=priority)
        self.num_added += 1
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @rule(data=st.data(), meanwhile=st.sampled_from(["nothing", "finish", "copy", "drop"]))
    def step(self, data: st.DataObject, meanwhile: str) -> None:
        slots = self.device.slots

        def during(schedule: Schedule) -> None:
            slots.named = {chunk.sequence.slot for chunk in schedule.chunks} - {0}
            for chunk in schedule.chunks:
                placement = chunk.sequence.placement
                if isinstance(placement, PlacedAdapter):
                    assert slots.held[chunk.sequence.slot][0] is placement.packed
            if meanwhile == "copy":
                self.copy()
            elif meanwhile == "finish" and self.live:
                self.scheduler.finish(data.draw(st.sampled_from(self.live)))
            elif meanwhile == "drop":
                self.drop(data)

        schedule = self.engine.step(during)
        slots.named = set()
        self.live = [sequence for sequence in self.live if not sequence.is_finished]
        assert schedule.chunks or not self.scheduler.has_work or self.scheduler.is_held_back, "stuck"

    @rule()
    def copy(self) -> None:
        self.device.copier.work()

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """As when the host's memory has no more room for it, which no request holds then."""
        held = {sequence.placement for sequence in self.live}
        idle = [adapter for adapter in self.device.adapters if adapter not in held]
        if idle:
            self.device.tier.remove(data.draw(st.sampled_from(idle)))

    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        if self.live:
            sequence = data.draw(st.sampled_from(self.live))
            self.scheduler.pause(sequence)
            if data.draw(st.booleans()):
                self.scheduler.resume(sequence)

    @invariant()
    def slots_are_told_apart_and_memory_is_accounted_for(self) -> None:
        if not hasattr(self, "device"):
            return
        slots = self.device.slots
        placed = {
            adapter.slot: adapter.packed for adapter in self.device.adapters if adapter.slot is not None
        }
        assert placed == {slot: packed for slot, (packed, _) in slots.held.items()}
        taken = sum(packed.num_bytes for packed in placed.values())
        assert slots.num_free_bytes == slots.num_bytes - taken
        running = [each for each in self.live if each.status is SequenceStatus.RUNNING]
        for adapter in self.device.adapters:
            assert adapter.num_running == sum(each.placement is adapter for each in running)
            assert adapter.slot is not None or not adapter.num_running

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        for sequence in self.live:
            self.scheduler.resume(sequence)
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.engine.step()
            self.copy()
        assert all(sequence.is_finished for sequence in self.live)
        assert all(adapter.num_running == 0 for adapter in self.device.adapters)


TestCopyingMachine = CopyingMachine.TestCase
TestCopyingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
