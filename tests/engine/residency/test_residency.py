from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter, PromptEmbeddings
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.residency.lease import Lease
from manyhats.engine.residency.residency import AdapterResidency
from manyhats.engine.residency.tiers import Tier
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from support.harnesses.engine import digest_of, make_record


@dataclass(frozen=True)
class TenBytes:
    """A packed adapter."""

    digest: str
    num_bytes: int = 10


class Slots:
    """``AdapterSlots`` that note which adapter each slot holds."""

    memory = None

    def __init__(self) -> None:
        self.held: dict[int, str] = {}

    def pack(self, adapter: LoweredAdapter) -> TenBytes:
        return TenBytes(adapter.digest)

    def place(self, slot: int, packed: TenBytes) -> None:
        assert slot > 0, "slot 0 is the base model"
        assert slot not in self.held, "written over"
        self.held[slot] = packed.digest

    def clear(self, slot: int) -> None:
        self.held.pop(slot, None)


def load(record: AdapterRecord) -> LoweredAdapter:
    return LoweredAdapter(record.digest, ())


def make(
    num_slots: int = 3,
    max_bytes: int = 10_000,
    load: Callable[[AdapterRecord], LoweredAdapter] = load,
    freed: list[VirtualTokens] | None = None,
) -> tuple[AdapterResidency, Slots]:
    slots, forget = Slots(), ([] if freed is None else freed).append
    return AdapterResidency(cast(AdapterSlots[Any], slots), num_slots, max_bytes, load, 32, forget), slots


def acquire(
    residency: AdapterResidency, record: AdapterRecord, lowered: LoweredAdapter | None = None
) -> Lease:
    """A lease of an adapter that is loaded, here and now if need be."""
    lease = residency.lease(record, partial(residency.fill, record, lowered))
    assert lease is not None, "there is no room"
    lease.adapter.loaded.result(10)
    return lease


def has_room(residency: AdapterResidency, name: str) -> bool:
    """Whether an adapter that is not in memory could be loaded; it is not, and gets an error."""
    lease = residency.lease(make_record(name), lambda: None)
    if lease is not None:
        residency.give_up(make_record(name), ValueError("only tried"))
    return lease is not None


def use(residency: AdapterResidency, *names: str) -> list[int | None]:
    """Lease each in turn, have a sequence run on it, and release it; the slots they had."""
    used = []
    for name in names:
        lease = acquire(residency, make_record(name))
        if lease.placement is None:
            used.append(0)
        else:
            used.append(lease.placement.place())
            lease.placement.leave()
        lease.release()
    return used


def resident(residency: AdapterResidency) -> set[str]:
    names = {digest_of(name): name for name in "abcdef"}
    return {names[digest] for digest in residency.tiers()}


def placed(residency: AdapterResidency) -> set[str]:
    names = {digest_of(name): name for name in "abcdef"}
    return {names[digest] for digest, tier in residency.tiers().items() if tier is Tier.DEVICE}


def test_an_adapter_is_loaded_once_and_keeps_its_slot() -> None:
    residency, slots = make()
    first, second = use(residency, "a", "a")
    assert first == second
    assert slots.held == {first: digest_of("a")}
    assert residency.stats.num_loads == 1
    assert residency.stats.resident_bytes == 10
    assert residency.stats.load_seconds >= 0


def test_what_is_lowered_already_is_not_read() -> None:
    def never(record: AdapterRecord) -> LoweredAdapter:
        raise AssertionError("it was read")

    residency, slots = make(load=never)
    acquire(residency, make_record("a"), load(make_record("a")))
    assert list(slots.held.values()) == [digest_of("a")]
    with pytest.raises(AssertionError, match="it was read"):
        acquire(residency, make_record("b"))


def test_only_what_is_loaded_can_be_had_without_waiting() -> None:
    residency, _ = make()
    assert residency.try_lease(make_record("a")) is None
    (slot,) = use(residency, "a")
    lease = residency.try_lease(make_record("a"))
    assert lease is not None
    assert lease.placement is not None
    assert lease.placement.place() == slot
    assert residency.in_use(make_record("a"))
    lease.release()
    assert not residency.in_use(make_record("a"))
    assert resident(residency) == {"a"}


def test_a_lease_is_released_once_however_often_that_is_asked_for() -> None:
    residency, _ = make()
    first, second = (acquire(residency, make_record("a")) for _ in range(2))
    for _ in range(3):
        first.release()
    assert residency.in_use(make_record("a"))
    second.release()
    assert not residency.in_use(make_record("a"))
    Lease().release()


def test_virtual_tokens_come_and_go_with_their_adapter() -> None:
    freed: list[VirtualTokens] = []

    def load_prompt(record: AdapterRecord) -> LoweredAdapter:
        return LoweredAdapter(record.digest, (), PromptEmbeddings(torch.zeros(3, 8)))

    residency, slots = make(load=load_prompt, freed=freed)
    a = acquire(residency, make_record("a"))
    b = acquire(residency, make_record("b"))
    b.release()
    assert a.virtual is not None
    assert (a.virtual.num_tokens, a.num_virtual_tokens) == (3, 3)
    assert residency.stats.resident_bytes == 2 * (10 + 3 * 8 * 4), "they count beside the numbers"
    residency.forget(digest_of("b"))
    assert freed == [b.virtual]
    a.release()
    residency.forget(digest_of("a"))
    assert freed == [b.virtual, a.virtual]
    assert residency.stats.resident_bytes == 0
    assert slots.held == {}


def test_an_adapter_that_is_virtual_tokens_alone_needs_no_slot_and_is_ready_without() -> None:
    def load_prompt(record: AdapterRecord) -> LoweredAdapter:
        return LoweredAdapter(record.digest, (), PromptEmbeddings(torch.zeros(3, 8)))

    residency, slots = make(num_slots=1, load=load_prompt)
    assert use(residency, "a", "b", "c") == [0, 0, 0]
    assert slots.held == {}
    assert placed(residency) == {"a", "b", "c"}
    assert residency.without_slot() == frozenset()


def test_virtual_tokens_that_the_kv_cache_cannot_hold_are_refused() -> None:
    def load_prompt(record: AdapterRecord) -> LoweredAdapter:
        return LoweredAdapter(record.digest, (), PromptEmbeddings(torch.zeros(32, 8)))

    residency, _ = make(load=load_prompt)
    with pytest.raises(FieldInvalidError, match="are 32; the KV cache holds 32 tokens in total"):
        acquire(residency, make_record("a"))
    assert (resident(residency), residency.stats.resident_bytes) == (set(), 0)


def test_the_least_recently_used_adapter_makes_room() -> None:
    residency, slots = make(num_slots=6, max_bytes=30)
    use(residency, "a", "b", "c", "a", "d")
    assert resident(residency) == {"a", "c", "d"}
    lease = residency.try_lease(make_record("c"))
    assert lease is not None
    lease.release()
    use(residency, "e")
    assert resident(residency) == {"c", "d", "e"}
    assert residency.stats.num_evictions == 2
    assert sorted(slots.held.values()) == sorted(residency.tiers())


def test_more_adapters_than_slots_stay_in_memory_and_are_read_once() -> None:
    read: list[str] = []

    def noting(record: AdapterRecord) -> LoweredAdapter:
        read.append(record.task_id)
        return load(record)

    residency, slots = make(num_slots=2, load=noting)
    use(residency, *"abcdabcd")
    assert read == [*"abcd"]
    assert resident(residency) == {*"abcd"}
    assert placed(residency) == {*"cd"}
    assert sorted(slots.held.values()) == sorted(map(digest_of, "cd"))
    assert (residency.stats.num_evictions, residency.stats.num_slot_evictions) == (0, 6)
    assert residency.stats.num_loads == 4


def test_an_adapter_gets_a_free_slot_when_it_is_loaded_but_nobody_s() -> None:
    residency, _ = make(num_slots=2)
    for name in "abc":
        acquire(residency, make_record(name))
    assert placed(residency) == {"a", "b"}
    assert residency.without_slot() == {"c@1"}
    assert residency.stats.num_slot_evictions == 0
    use(residency, "c")
    assert placed(residency) == {"b", "c"}, "a was idle for longest"
    assert residency.without_slot() == {"a@1"}


def test_an_adapter_in_use_is_never_evicted() -> None:
    residency, _ = make(max_bytes=20)
    a = acquire(residency, make_record("a"))
    use(residency, "b", "c", "d")
    assert resident(residency) == {"a", "d"}
    acquire(residency, make_record("d"))
    assert not has_room(residency, "e")
    assert resident(residency) == {"a", "d"}
    a.release()
    use(residency, "e")
    assert resident(residency) == {"d", "e"}


def test_what_two_loads_took_beyond_the_memory_is_given_back_when_something_is_released() -> None:
    residency, _ = make(num_slots=6, max_bytes=25)
    first = acquire(residency, make_record("a"))
    loading = [residency.lease(make_record(name), lambda: None) for name in ("b", "c")]
    for name in ("b", "c"):
        residency.fill(make_record(name))
    assert residency.stats.resident_bytes == 30
    first.release()
    for lease in loading:
        assert lease is not None
        assert lease.adapter.loaded.done()
        lease.release()
    assert residency.stats.resident_bytes == 20
    assert resident(residency) == {"b", "c"}


def test_memory_is_freed_down_to_the_limit_but_for_what_is_in_use() -> None:
    residency, _ = make(num_slots=6, max_bytes=25)
    use(residency, "a", "b", "c")
    assert resident(residency) == {"b", "c"}
    for name in "def":
        acquire(residency, make_record(name))
    assert resident(residency) == {"d", "e", "f"}
    assert residency.stats.resident_bytes == 30
    assert residency.stats.num_evictions == 3


def test_few_are_loaded_at_a_time_since_their_bytes_are_known_only_then() -> None:
    residency, _ = make(max_bytes=10)
    begun = [residency.lease(make_record(name), lambda: None) for name in "abc"]
    assert [lease is not None for lease in begun] == [True, True, False]
    assert residency.lease(make_record("a"), None) is not None, "it is being loaded already"
    residency.fill(make_record("a"))
    residency.give_up(make_record("b"), ValueError("torn"))
    assert not has_room(residency, "c")
    begun[0].release()
    assert not has_room(residency, "c"), "it was leased twice"


def test_every_lease_counts() -> None:
    residency, _ = make(max_bytes=10)
    first, second = (acquire(residency, make_record("a")) for _ in range(2))
    first.release()
    assert residency.in_use(make_record("a"))
    assert not has_room(residency, "b")
    second.release()
    use(residency, "b")
    assert resident(residency) == {"b"}


def test_versions_of_the_same_bytes_share_a_slot_and_each_has_its_own_leases() -> None:
    residency, slots = make(num_slots=1, max_bytes=10)
    bytes_ = digest_of("a")
    versions = [make_record(task, bytes_, version) for task in ("one", "two") for version in (1, 2)]
    leases = [acquire(residency, record) for record in versions]
    assert {lease.placement.place() for lease in leases if lease.placement is not None} == {1}
    assert residency.stats.num_loads == 1
    for index, lease in enumerate(leases):
        assert [residency.in_use(each) for each in versions] == [i >= index for i in range(4)]
        assert slots.held, "as long as one of them is in use"
        assert not has_room(residency, "b")
        lease.release()
    use(residency, "b")
    assert resident(residency) == {"b"}


def test_a_forgotten_adapter_goes_at_once_or_when_its_last_request_ends() -> None:
    residency, slots = make()
    use(residency, "a")
    residency.forget(digest_of("a"))
    assert (resident(residency), slots.held, residency.stats.resident_bytes) == (set(), {}, 0)
    first, second = (acquire(residency, make_record("b")) for _ in range(2))
    residency.forget(digest_of("b"))
    assert resident(residency) == set()
    assert residency.in_use(make_record("b"))
    first.release()
    assert slots.held
    second.release()
    assert (slots.held, residency.stats.resident_bytes) == ({}, 0)
    residency.forget(digest_of("never seen"))


def test_an_adapter_registered_again_while_the_forgotten_one_is_in_use_stays() -> None:
    residency, _ = make()
    lease = acquire(residency, make_record("a"))
    residency.forget(digest_of("a"))
    use(residency, "a")
    lease.release()
    assert resident(residency) == {"a"}
    assert residency.stats.num_loads == 1


def test_a_failed_load_leaves_nothing_and_can_be_tried_again() -> None:
    failures = [ValueError("torn"), None]

    def torn(record: AdapterRecord) -> LoweredAdapter:
        error = failures.pop(0)
        if error is not None:
            raise error
        return load(record)

    residency, slots = make(num_slots=1, load=torn)
    with pytest.raises(ValueError, match="torn"):
        acquire(residency, make_record("a"))
    assert (resident(residency), slots.held, residency.stats.resident_bytes) == (set(), {}, 0)
    assert not residency.in_use(make_record("a"))
    assert residency.try_lease(make_record("a")) is None
    use(residency, "a")
    assert resident(residency) == {"a"}


class Gate:
    """A loader that waits until it is let through."""

    def __init__(self, error: Exception | None = None) -> None:
        self.started = threading.Event()
        self.opened = threading.Event()
        self.error = error
        self.num_calls = 0

    def __call__(self, record: AdapterRecord) -> LoweredAdapter:
        self.num_calls += 1
        self.started.set()
        assert self.opened.wait(10)
        if self.error is not None:
            raise self.error
        return load(record)


def wait_for_pins(residency: AdapterResidency, count: int) -> None:
    """Until ``count`` callers hold or await the adapter a."""
    for _ in range(2000):
        adapter = residency._adapters.get(digest_of("a"))
        if adapter is not None and adapter.leases.total() == count:
            return
        time.sleep(0.002)
    raise AssertionError("the callers never came")


def test_callers_at_the_same_time_share_one_load() -> None:
    gate = Gate()
    residency, _ = make(load=gate)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(acquire, residency, make_record("a")) for _ in range(4)]
        wait_for_pins(residency, 4)
        assert residency.try_lease(make_record("a")) is None
        assert resident(residency) == set()
        gate.opened.set()
        leases = [call.result(10) for call in calls]
        assert len({lease.adapter for lease in leases}) == 1
    assert gate.num_calls == 1
    for lease in leases:
        assert residency.in_use(make_record("a"))
        lease.release()
    assert not residency.in_use(make_record("a"))


def test_a_load_that_fails_fails_every_caller_that_waits_for_it() -> None:
    gate = Gate(ValueError("torn"))
    residency, slots = make(num_slots=1, load=gate)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(acquire, residency, make_record("a")) for _ in range(3)]
        wait_for_pins(residency, 3)
        gate.opened.set()
        for call in calls:
            assert isinstance(call.exception(10), ValueError)
    assert gate.num_calls == 1
    assert slots.held == {}
    assert not residency.in_use(make_record("a"))
    gate.error = None
    use(residency, "b")
    assert resident(residency) == {"b"}


def test_a_slow_load_holds_up_no_other_adapter() -> None:
    gate = Gate()
    residency, _ = make(
        max_bytes=20, load=lambda record: gate(record) if record.task_id == "a" else load(record)
    )
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(acquire, residency, make_record("a"))
        assert gate.started.wait(10)
        use(residency, "b", "c")
        assert resident(residency) == {"b", "c"}
        use(residency, "d")
        assert resident(residency) == {"c", "d"}
        gate.opened.set()
        slow.result(10)
    assert resident(residency) == {"a", "d"}


def test_an_adapter_forgotten_while_it_is_loaded_serves_who_asked_and_then_goes() -> None:
    gate = Gate()
    residency, slots = make(load=gate)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(acquire, residency, make_record("a"))
        assert gate.started.wait(10)
        residency.forget(digest_of("a"))
        gate.opened.set()
        lease = call.result(10)
        assert lease.placement is not None
        assert lease.placement.place() in slots.held
    assert resident(residency) == set()
    lease.placement.leave()
    lease.release()
    assert slots.held == {}
