"""Where adapters in memory are, and which of them have the device's slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from manyhats.adapters.errors import AdapterTooLargeError
from manyhats.engine.errors import AdapterCapacityError

if TYPE_CHECKING:
    from manyhats.engine.backends.backend import AdapterSlots, Packed

_MAX_WAIT_S = 10.0
_RETRY_S = 0.02


class Tier(Enum):
    """The fastest memory that an adapter is in: packed in the host's, or ready for the next step on the device."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """A device's own memory for adapters: how much is taken and free, and how much was copied to it since the start."""

    used: int
    free: int
    copied: int


class DeviceTier:
    """Slots 1 … n. A slot whose adapter runs in no sequence may go to another, the longest idle first.

    No step that is launched or still to run names such a slot: a sequence leaves it after its last step.

    Where adapters are copied to a device's own memory, one thread of the tier's copies them, and makes room there. The
    first ``place`` asks for the copy; the adapter has its slot once it is there. Only that thread takes memory, so what
    it finds free stays free for it. Thread-safe; nothing but ``fill_free`` and ``holding`` waits.

    Args:
        slots: the backend's.
        num_slots: n.
        copier: one thread, which begins with the first copy.
        on_change: called, on any thread, when a copy has ended, or room was made that nothing else tells of.
    """

    def __init__(
        self,
        slots: AdapterSlots[Any],
        num_slots: int,
        copier: Executor,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._slots = slots
        self._memory = slots.memory
        self._on_change = on_change
        self._copier = copier
        self._free = list(range(num_slots, 0, -1))
        self._idle: dict[PlacedAdapter, None] = {}  # they have slots; longest idle first
        self._lock = threading.Lock()
        self._num_coming = 0
        self.num_evictions = 0

    @property
    def num_bytes(self) -> DeviceBytes | None:
        """Of the device's own memory; None if it has none."""
        memory = self._memory
        if memory is None:
            return None
        free = memory.num_free_bytes
        return DeviceBytes(memory.num_bytes - free, free, memory.num_copied_bytes)

    def can_place(self, adapter: PlacedAdapter) -> bool:
        """Whether ``place`` would give a slot, or begin to, unless ``fill_free`` takes the last free one first."""
        if adapter.slot is not None:
            return True
        if self._memory is None:
            return bool(self._free or self._idle)
        with self._lock:
            return not adapter.is_asked and self._in_the_way(adapter) is not None

    def is_coming(self, adapter: PlacedAdapter) -> bool:
        """Whether an adapter is being copied, this one or what it may follow, or whether that has just ended."""
        return self._memory is not None and (self._num_coming > 0 or self.can_place(adapter))

    def place(self, adapter: PlacedAdapter) -> int | None:
        """Get a slot for one more sequence; called on the engine's thread, between two steps.

        Raises:
            Exception: the adapter's last copy failed, as the device did.
        """
        with self._lock:
            adapter.is_removed = False  # it is wanted again
            if adapter.slot is None and not self._has_entered(adapter):
                return None
            self._idle.pop(adapter, None)
            adapter.num_running += 1
            return adapter.slot

    def leave(self, adapter: PlacedAdapter) -> None:
        """Note that one of its sequences no longer runs; it keeps the slot until another adapter needs it."""
        with self._lock:
            adapter.num_running -= 1
            if not adapter.num_running:
                self._idle[adapter] = None

    def fill_free(self, adapter: PlacedAdapter) -> None:
        """Put a new adapter into a free slot, if there is one, before its sequences start; waits for its copy."""
        with self._lock:
            if not self._free or self._in_the_way(adapter) != []:
                return
            if self._memory is None:
                self._enter(adapter)
                self._idle[adapter] = None
                return
            copied = self._ask(adapter, may_evict=False)
        copied.result()
        if adapter.failure is not None:
            raise adapter.failure

    def remove(self, adapter: PlacedAdapter) -> None:
        """Take back the slot of an adapter that no unfinished sequence uses, at the latest when its copy has ended."""
        with self._lock:
            self._idle.pop(adapter, None)
            adapter.is_removed = adapter.is_asked
            if not adapter.is_asked:
                self._clear(adapter)

    def check_fits(self, packed: Packed) -> None:
        """Check that an adapter could be placed if it were alone.

        Raises:
            AdapterTooLargeError: the device's memory for adapters is smaller.
        """
        if self._memory is None:
            return
        num_bytes = self._memory.bytes_of(packed)
        if num_bytes > self._memory.num_bytes:
            raise AdapterTooLargeError(
                "adapter",
                f"takes {num_bytes} bytes of the GPU's memory; --gpu-adapter-bytes is {self._memory.num_bytes}",
            )

    @contextmanager
    def holding(self, slot: int, packed: Packed) -> Iterator[None]:
        """Have an adapter in a slot beyond the tier's; waits for room and for the copy, so not on the engine's thread.

        Raises:
            AdapterTooLargeError: as ``check_fits``.
            AdapterCapacityError: adapters that run leave no room for it.
        """
        self.check_fits(packed)
        if self._memory is None:
            self._slots.place(slot, packed)
        else:
            self._hold(PlacedAdapter(self, packed), slot)
        try:
            yield
        finally:
            self._slots.clear(slot)
            self._on_change()

    def close(self) -> None:
        """Copy no more, once nothing calls ``place``."""
        self._copier.shutdown(wait=False, cancel_futures=True)

    def _hold(self, adapter: PlacedAdapter, slot: int) -> None:
        until = time.monotonic() + _MAX_WAIT_S
        while not self._copier.submit(self._copy_to, adapter, slot).result():
            if time.monotonic() >= until:
                assert self._memory is not None
                raise AdapterCapacityError(self._memory.num_bytes)
            time.sleep(_RETRY_S)

    def _copy_to(self, adapter: PlacedAdapter, slot: int) -> bool:
        """Copy an adapter into a slot beyond these, on the copier; False if there is no room."""
        with self._lock:
            going = self._in_the_way(adapter, needs_slot=False)
            for idle in going or ():
                self._evict(idle)
        if going is not None:
            self._slots.place(slot, adapter.packed)
        return going is not None

    def _has_entered(self, adapter: PlacedAdapter) -> bool:
        """Whether an adapter has a slot now; one that has to be copied gets it later."""
        if self._memory is not None:
            if not adapter.is_asked:
                self._ask(adapter)
            return False
        going = self._in_the_way(adapter)
        for idle in going or ():
            self._evict(idle)
        if going is not None:
            self._enter(adapter)
        return going is not None

    def _enter(self, adapter: PlacedAdapter) -> None:
        self._slots.place(self._free[-1], adapter.packed)
        adapter.slot = self._free.pop()

    def _ask(self, adapter: PlacedAdapter, *, may_evict: bool = True) -> Future[None]:
        """Have an adapter copied."""
        failure, adapter.failure = adapter.failure, None
        if failure is not None:
            raise failure
        copied = self._copier.submit(self._copy, adapter, may_evict)
        adapter.is_asked = True
        self._num_coming += 1
        return copied

    def _copy(self, adapter: PlacedAdapter, may_evict: bool) -> None:
        """Copy an adapter into a free slot, on the copier, after evicting what is in the way."""
        slot: int | None = None
        try:
            with self._lock:
                going = None if adapter.is_removed else self._in_the_way(adapter)
                if going == [] or (going and may_evict):
                    slot = self._slot_after(going)
            if slot is not None:
                self._slots.place(slot, adapter.packed)
        except BaseException as error:  # noqa: BLE001 whatever it was, it is raised where the slot is asked for
            adapter.failure = error
        with self._lock:
            self._arrive(adapter, slot)
        self._on_change()

    def _slot_after(self, going: list[PlacedAdapter]) -> int:
        for idle in going:
            self._evict(idle)
        return self._free.pop()

    def _arrive(self, adapter: PlacedAdapter, slot: int | None) -> None:
        adapter.is_asked = False
        self._num_coming -= 1
        if adapter.failure is not None and slot is not None:
            self._free.append(slot)
            return
        adapter.slot = slot
        if adapter.is_removed:
            self._clear(adapter)
        elif slot is not None:
            self._idle[adapter] = None

    def _in_the_way(self, adapter: PlacedAdapter, *, needs_slot: bool = True) -> list[PlacedAdapter] | None:
        """The idle adapters to evict so that another has its slot and its bytes; None if that is not enough."""
        idle = list(self._idle)
        going: list[PlacedAdapter] = []
        if self._memory is not None:
            num_bytes = self._memory.bytes_of(adapter.packed)
            slots = self._memory.evictions(num_bytes, [each.slot for each in idle if each.slot is not None])
            if slots is None:
                return None
            going = [each for each in idle if each.slot in slots]
        if going or self._free or not needs_slot:
            return going
        return idle[:1] or None

    def _evict(self, idle: PlacedAdapter) -> None:
        """Take the slot of an idle adapter."""
        del self._idle[idle]
        self._clear(idle)
        self.num_evictions += 1

    def _clear(self, adapter: PlacedAdapter) -> None:
        if adapter.slot is not None:
            self._slots.clear(adapter.slot)
            self._free.append(adapter.slot)
            adapter.slot = None


@dataclass(slots=True, eq=False)
class PlacedAdapter:
    """The ``Placement`` of one adapter's sequences.

    Attributes:
        tier: changes the others.
        packed: the packed adapter.
        slot: its slot on the device, if any.
        num_running: sequences that run on it.
        is_asked: whether its copy is asked for, and has not ended.
        is_removed: whether it is to have no slot once the copy has ended.
        failure: what ended the last copy, until somebody is told.
    """

    tier: DeviceTier
    packed: Packed
    slot: int | None = None
    num_running: int = 0
    is_asked: bool = False
    is_removed: bool = False
    failure: BaseException | None = None

    @property
    def current(self) -> Tier:
        """Its current tier."""
        return Tier.HOST if self.slot is None else Tier.DEVICE

    def can_place(self) -> bool:
        """See ``DeviceTier``."""
        return self.tier.can_place(self)

    def place(self) -> int | None:
        """See ``DeviceTier``."""
        return self.tier.place(self)

    def is_coming(self) -> bool:
        """See ``DeviceTier``."""
        return self.tier.is_coming(self)

    def leave(self) -> None:
        """See ``DeviceTier``."""
        self.tier.leave(self)
