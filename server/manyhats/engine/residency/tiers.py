"""Where adapters in memory are, and which of them have the device's slots."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyhats.engine.backends.backend import AdapterSlots, Packed


class Tier(Enum):
    """The fastest memory that an adapter is in: packed in the host's, or ready for the next step on the device."""

    DEVICE = "device"
    HOST = "host"


class DeviceTier:
    """Slots 1 … n. A slot whose adapter runs in no sequence may go to another, the longest idle first.

    Steps run between two calls of ``place``, so a slot that is taken from an adapter is in no step still to run.
    Thread-safe.
    """

    def __init__(self, slots: AdapterSlots[Any], num_slots: int) -> None:
        self._slots = slots
        self._free = list(range(num_slots, 0, -1))
        self._idle: dict[PlacedAdapter, None] = {}  # they have slots; longest idle first
        self._lock = threading.Lock()
        self.num_evictions = 0

    def can_place(self, adapter: PlacedAdapter) -> bool:
        """Whether ``place`` would give a slot, unless ``fill_free`` takes the last free one first."""
        return adapter.slot is not None or bool(self._free or self._idle)

    def place(self, adapter: PlacedAdapter) -> int | None:
        """Get a slot for one more sequence; called on the engine's thread, between two steps."""
        with self._lock:
            if adapter.slot is None:
                if not self._free and not self._evict():
                    return None
                self._enter(adapter)
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
        """Put a new adapter into a free slot, if there is one, before its sequences start."""
        with self._lock:
            if self._free:
                self._enter(adapter)
                self._idle[adapter] = None

    def remove(self, adapter: PlacedAdapter) -> None:
        """Take back the slot of an adapter that no unfinished sequence uses."""
        with self._lock:
            self._idle.pop(adapter, None)
            self._clear(adapter)

    def _enter(self, adapter: PlacedAdapter) -> None:
        self._slots.place(self._free[-1], adapter.packed)
        adapter.slot = self._free.pop()

    def _evict(self) -> bool:
        """Take the slot of an idle adapter; returns whether there was one."""
        idle = next(iter(self._idle), None)
        if idle is None:
            return False
        del self._idle[idle]
        self._clear(idle)
        self.num_evictions += 1
        return True

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
    """

    tier: DeviceTier
    packed: Packed
    slot: int | None = None
    num_running: int = 0

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

    def leave(self) -> None:
        """See ``DeviceTier``."""
        self.tier.leave(self)
