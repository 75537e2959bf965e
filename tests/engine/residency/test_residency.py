from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.backends.backend import AdapterSlots
from manyhats.engine.errors import AdapterCapacityError
from manyhats.engine.residency.residency import AdapterResidency, ResidentAdapter
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from support.harnesses.engine import digest_of, make_record


@dataclass(frozen=True)
class TenBytes:
    """A packed adapter."""

    digest: str
    num_bytes: int = 10


class Slots:
    """``AdapterSlots`` that note which adapter each slot holds."""

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


class Prefixes:
    """Puts no block anywhere, and says what it was asked for."""

    def __init__(self) -> None:
        self.held: list[VirtualTokens] = []

    def add(self, prefix: KVPrefix | PromptEmbeddings) -> VirtualTokens:
        self.held.append(VirtualTokens(prefix))
        return self.held[-1]

    def remove(self, prefix: VirtualTokens) -> None:
        self.held.remove(prefix)


def load(record: AdapterRecord) -> LoweredAdapter:
    return LoweredAdapter(record.digest, ())


def make(
    num_slots: int = 3,
    max_bytes: int = 10_000,
    load: Callable[[AdapterRecord], LoweredAdapter] = load,
    prefixes: Prefixes | None = None,
) -> tuple[AdapterResidency, Slots]:
    slots = Slots()
    return AdapterResidency(
        cast(AdapterSlots[Any], slots), num_slots, max_bytes, load, prefixes or Prefixes()
    ), slots


def use(residency: AdapterResidency, *names: str) -> list[int]:
    """Acquire and release each in turn."""
    used = []
    for name in names:
        used.append(residency.acquire(make_record(name)).slot)
        residency.release(make_record(name))
    return used


def resident(residency: AdapterResidency) -> set[str]:
    names = {digest_of(name): name for name in "abcdef"}
    return {names[digest] for digest in residency.resident_digests()}


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
    residency.acquire(make_record("a"), load(make_record("a")))
    assert list(slots.held.values()) == [digest_of("a")]
    with pytest.raises(AssertionError, match="it was read"):
        residency.acquire(make_record("b"))


def test_only_what_is_loaded_can_be_had_without_waiting() -> None:
    residency, _ = make()
    assert residency.try_acquire(make_record("a")) is None
    (slot,) = use(residency, "a")
    assert residency.try_acquire(make_record("a")) == ResidentAdapter(slot)
    assert residency.in_use(make_record("a"))
    residency.release(make_record("a"))
    assert not residency.in_use(make_record("a"))
    assert resident(residency) == {"a"}


def test_virtual_tokens_come_and_go_with_their_adapter() -> None:
    prefixes = Prefixes()

    def load_prompt(record: AdapterRecord) -> LoweredAdapter:
        return LoweredAdapter(record.digest, (), PromptEmbeddings(torch.zeros(3, 8)))

    residency, _ = make(load=load_prompt, prefixes=prefixes)
    a = residency.acquire(make_record("a"))
    use(residency, "b")
    assert a.virtual is prefixes.held[0]
    assert a.virtual.num_tokens == 3
    assert residency.stats.resident_bytes == 2 * (10 + 3 * 8 * 4), "they count beside the slot's"
    residency.forget(digest_of("b"))
    assert prefixes.held == [a.virtual]
    residency.release(make_record("a"))
    residency.forget(digest_of("a"))
    assert prefixes.held == []
    assert residency.stats.resident_bytes == 0


def test_the_least_recently_used_adapter_makes_room() -> None:
    residency, slots = make(num_slots=3)
    use(residency, "a", "b", "c", "a", "d")
    assert resident(residency) == {"a", "c", "d"}
    assert residency.try_acquire(make_record("c")) is not None
    residency.release(make_record("c"))
    use(residency, "e")
    assert resident(residency) == {"c", "d", "e"}
    assert residency.stats.num_evictions == 2
    assert sorted(slots.held.values()) == sorted(residency.resident_digests())


def test_an_adapter_in_use_is_never_evicted() -> None:
    residency, _ = make(num_slots=2)
    residency.acquire(make_record("a"))
    use(residency, "b", "c", "d")
    assert resident(residency) == {"a", "d"}
    residency.acquire(make_record("d"))
    with pytest.raises(AdapterCapacityError) as caught:
        residency.acquire(make_record("e"))
    assert caught.value.limit == 2
    assert resident(residency) == {"a", "d"}
    residency.release(make_record("a"))
    use(residency, "e")
    assert resident(residency) == {"d", "e"}


def test_memory_is_freed_down_to_the_limit_but_for_what_is_in_use() -> None:
    residency, _ = make(num_slots=6, max_bytes=25)
    use(residency, "a", "b", "c")
    assert resident(residency) == {"b", "c"}
    for name in "def":
        residency.acquire(make_record(name))
    assert resident(residency) == {"d", "e", "f"}
    assert residency.stats.resident_bytes == 30
    assert residency.stats.num_evictions == 3


def test_every_pin_counts() -> None:
    residency, _ = make(num_slots=1)
    for _ in range(2):
        residency.acquire(make_record("a"))
    residency.release(make_record("a"))
    assert residency.in_use(make_record("a"))
    with pytest.raises(AdapterCapacityError):
        residency.acquire(make_record("b"))
    residency.release(make_record("a"))
    use(residency, "b")
    assert resident(residency) == {"b"}


def test_versions_of_the_same_bytes_share_a_slot_and_each_has_its_own_pins() -> None:
    residency, slots = make(num_slots=1)
    bytes_ = digest_of("a")
    versions = [make_record(task, bytes_, version) for task in ("one", "two") for version in (1, 2)]
    used = [residency.acquire(record).slot for record in versions]
    assert len(set(used)) == 1
    assert residency.stats.num_loads == 1
    for index, record in enumerate(versions):
        assert [residency.in_use(each) for each in versions] == [i >= index for i in range(4)]
        assert slots.held, "as long as one of them is in use"
        with pytest.raises(AdapterCapacityError):
            residency.acquire(make_record("b"))
        residency.release(record)
    use(residency, "b")
    assert resident(residency) == {"b"}


def test_a_forgotten_adapter_goes_at_once_or_when_its_last_request_ends() -> None:
    residency, slots = make()
    use(residency, "a")
    residency.forget(digest_of("a"))
    assert (resident(residency), slots.held, residency.stats.resident_bytes) == (set(), {}, 0)
    residency.acquire(make_record("b"))
    residency.acquire(make_record("b"))
    residency.forget(digest_of("b"))
    assert resident(residency) == set()
    assert residency.in_use(make_record("b"))
    residency.release(make_record("b"))
    assert slots.held
    residency.release(make_record("b"))
    assert (slots.held, residency.stats.resident_bytes) == ({}, 0)
    residency.forget(digest_of("never seen"))


def test_an_adapter_registered_again_while_the_forgotten_one_is_in_use_stays() -> None:
    residency, _ = make()
    residency.acquire(make_record("a"))
    residency.forget(digest_of("a"))
    use(residency, "a")
    residency.release(make_record("a"))
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
        residency.acquire(make_record("a"))
    assert (resident(residency), slots.held, residency.stats.resident_bytes) == (set(), {}, 0)
    assert not residency.in_use(make_record("a"))
    assert residency.try_acquire(make_record("a")) is None
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
        entry = residency._entries.get(digest_of("a"))
        if entry is not None and entry.pins.total() == count:
            return
        time.sleep(0.002)
    raise AssertionError("the callers never came")


def test_callers_at_the_same_time_share_one_load() -> None:
    gate = Gate()
    residency, _ = make(load=gate)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(residency.acquire, make_record("a")) for _ in range(4)]
        wait_for_pins(residency, 4)
        assert residency.try_acquire(make_record("a")) is None
        assert resident(residency) == set()
        gate.opened.set()
        assert len({call.result(10) for call in calls}) == 1
    assert gate.num_calls == 1
    for _ in range(4):
        assert residency.in_use(make_record("a"))
        residency.release(make_record("a"))
    assert not residency.in_use(make_record("a"))


def test_a_load_that_fails_fails_every_caller_that_waits_for_it() -> None:
    gate = Gate(ValueError("torn"))
    residency, slots = make(num_slots=1, load=gate)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(residency.acquire, make_record("a")) for _ in range(3)]
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
    residency, _ = make(load=lambda record: gate(record) if record.task_id == "a" else load(record))
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(residency.acquire, make_record("a"))
        assert gate.started.wait(10)
        use(residency, "b", "c")
        assert resident(residency) == {"b", "c"}
        use(residency, "d")
        assert resident(residency) == {"c", "d"}
        gate.opened.set()
        slow.result(10)
    assert resident(residency) == {"a", "c", "d"}


def test_an_adapter_forgotten_while_it_is_loaded_serves_who_asked_and_then_goes() -> None:
    gate = Gate()
    residency, slots = make(load=gate)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(residency.acquire, make_record("a"))
        assert gate.started.wait(10)
        residency.forget(digest_of("a"))
        gate.opened.set()
        assert call.result(10).slot in slots.held
    assert resident(residency) == set()
    residency.release(make_record("a"))
    assert slots.held == {}
