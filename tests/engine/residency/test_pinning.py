"""Pinned adapters stay in memory, whatever else comes and goes; an explicit model of it beside the real thing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.errors import PinLimitError
from manyhats.engine.residency.lease import Lease
from manyhats.engine.residency.residency import AdapterResidency
from support.harnesses.engine import digest_of, make_record

SIZES = {"a": 10, "b": 20, "c": 30, "d": 40, "e": 70}
MAX_BYTES = 100


@dataclass(frozen=True)
class Packed:
    num_bytes: int


class Slots:
    """``AdapterSlots`` of adapters whose sizes are given."""

    memory = None

    def pack(self, adapter: LoweredAdapter) -> Packed:
        return Packed(next(size for name, size in SIZES.items() if digest_of(name) == adapter.digest))

    def place(self, slot: int, packed: Packed) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass


def make() -> AdapterResidency:
    def load(record: AdapterRecord) -> LoweredAdapter:
        return LoweredAdapter(record.digest, ())

    return AdapterResidency(cast(AdapterSlots[Any], Slots()), 2, MAX_BYTES, load, 32, lambda virtual: None)


def leased(residency: AdapterResidency, name: str) -> Lease | None:
    lease = residency.lease(make_record(name), partial(residency.fill, make_record(name)))
    if lease is not None:
        lease.adapter.loaded.result(10)
    return lease


def pin(residency: AdapterResidency, name: str) -> None:
    lease = leased(residency, name)
    assert lease is not None
    try:
        residency.pin(digest_of(name))
    finally:
        lease.release()


def use(residency: AdapterResidency, *names: str) -> None:
    for name in names:
        lease = leased(residency, name)
        assert lease is not None
        lease.release()


def in_memory(residency: AdapterResidency) -> set[str]:
    return {name for name in SIZES if digest_of(name) in residency.tiers()}


def test_a_pinned_adapter_stays_and_others_make_room() -> None:
    residency = make()
    pin(residency, "a")
    use(residency, "c", "d", "e", "d")
    assert in_memory(residency) == {"a", "d"}
    residency.unpin(digest_of("a"))
    use(residency, "e")
    assert in_memory(residency) == {"e"}, "it is the least recently used one now"


def test_what_does_not_fit_beside_the_pinned_is_refused_by_its_bytes() -> None:
    residency = make()
    pin(residency, "e")
    pin(residency, "c")
    pin(residency, "c")  # once more changes nothing
    with pytest.raises(PinLimitError, match=r"10 bytes.* 100 are pinned.*, 100 bytes"):
        pin(residency, "a")
    assert residency.pinned() == {digest_of("e"), digest_of("c")}
    assert residency.stats.pinned_bytes == 100


def test_others_are_served_one_at_a_time_beside_pinned_ones_that_fill_the_memory() -> None:
    residency = make()
    pin(residency, "e")
    pin(residency, "c")
    one = leased(residency, "a")
    assert one is not None
    assert leased(residency, "b") is None, "it waits for the first"
    one.release()
    use(residency, "b", "d", "a")
    assert in_memory(residency) == {"e", "c", "a"}


def test_a_pin_ends_with_its_adapter_and_does_not_come_back_with_the_same_bytes() -> None:
    residency = make()
    pin(residency, "a")
    held = leased(residency, "a")
    residency.forget(digest_of("a"))
    assert residency.pinned() == frozenset()
    again = leased(residency, "a")
    assert again is not None
    assert held is not None
    again.release()
    held.release()
    use(residency, "e", "d")
    assert in_memory(residency) == {"d"}


class PinningMachine(RuleBasedStateMachine):
    """Requests and pins at random. What must hold is said of names and sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = make()
        self.pinned: set[str] = set()
        self.leases: list[tuple[str, Lease]] = []

    @property
    def held(self) -> Counter[str]:
        return Counter(name for name, _ in self.leases)

    def bytes_of(self, names: set[str]) -> int:
        return sum(SIZES[name] for name in names)

    @rule(name=st.sampled_from(sorted(SIZES)))
    def request(self, name: str) -> None:
        was_in_memory = name in in_memory(self.residency)
        kept = self.pinned | set(self.held)
        lease = leased(self.residency, name)
        if lease is None:
            assert not was_in_memory
            assert self.bytes_of(kept) >= MAX_BYTES, "there was room, or others to make some"
            assert set(self.held) - self.pinned, "nobody keeps it waiting but requests that end"
        else:
            self.leases.append((name, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @rule(name=st.sampled_from(sorted(SIZES)))
    def pin(self, name: str) -> None:
        fits = self.bytes_of(self.pinned | {name}) <= MAX_BYTES
        lease = leased(self.residency, name)
        if lease is None:
            return
        try:
            self.residency.pin(digest_of(name))
        except PinLimitError:
            assert not fits
        else:
            assert fits
            self.pinned.add(name)
        lease.release()

    @rule(name=st.sampled_from(sorted(SIZES)))
    def unpin(self, name: str) -> None:
        self.residency.unpin(digest_of(name))
        self.pinned.discard(name)

    @rule(name=st.sampled_from(sorted(SIZES)))
    def forget(self, name: str) -> None:
        self.residency.forget(digest_of(name))
        self.pinned.discard(name)

    @invariant()
    def what_is_pinned_or_held_is_in_memory(self) -> None:
        there = in_memory(self.residency)
        assert self.pinned <= there
        assert self.residency.pinned() == {digest_of(name) for name in self.pinned}
        assert self.residency.stats.pinned_bytes == self.bytes_of(self.pinned) <= MAX_BYTES

    @invariant()
    def no_more_is_in_memory_than_may_be_but_for_what_cannot_go(self) -> None:
        cannot_go = self.bytes_of(self.pinned | set(self.held))
        last = max(SIZES.values())  # an adapter's size is known once it is loaded
        assert self.residency.stats.resident_bytes <= max(MAX_BYTES, cannot_go) + last


TestPinning = PinningMachine.TestCase
