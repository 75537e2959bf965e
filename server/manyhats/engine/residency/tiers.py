"""Where adapters in memory are, and which of them have the slots of the device."""

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
    """Slots 1 … n. One whose adapter runs in no sequence goes to another, the one that has been idle for longest first.

    Steps run between two calls of ``place``, so a slot that is taken from an adapter is in no step that is left to run.
    Safe from any thread.
    """

    def __init__(self, slots: AdapterSlots[Any], num_slots: int) -> None:
        self._slots = slots
        self._free = list(range(num_slots, 0, -1))
        self._idle: dict[PlacedAdapter, None] = {}  # they have slots; idle for longest first
        self._lock = threading.Lock()
        self.num_evictions = 0

    def can_place(self, adapter: PlacedAdapter) -> bool:
        """Whether ``place`` gives a slot, unless ``fill_free`` takes the last free one meanwhile."""
        return adapter.slot is not None or bool(self._free or self._idle)

    def place(self, adapter: PlacedAdapter) -> int | None:
        """A slot for one more sequence; on the engine's thread, between two steps."""
        with self._lock:
            if adapter.slot is None:
                if not self._free and not self._evict():
                    return None
                self._enter(adapter)
            self._idle.pop(adapter, None)
            adapter.num_running += 1
            return adapter.slot

    def leave(self, adapter: PlacedAdapter) -> None:
        """One of its sequences runs no more; the slot stays its own until another adapter needs it."""
        with self._lock:
            adapter.num_running -= 1
            if not adapter.num_running:
                self._idle[adapter] = None

    def fill_free(self, adapter: PlacedAdapter) -> None:
        """Puts a new adapter into a free slot, if there is one, ahead of its sequences."""
        with self._lock:
            if self._free:
                self._enter(adapter)
                self._idle[adapter] = None

    def remove(self, adapter: PlacedAdapter) -> None:
        """Takes back the slot of an adapter that no unfinished sequence is on."""
        with self._lock:
            self._idle.pop(adapter, None)
            self._clear(adapter)

    def _enter(self, adapter: PlacedAdapter) -> None:
        self._slots.place(self._free[-1], adapter.packed)
        adapter.slot = self._free.pop()

    def _evict(self) -> bool:
        """Whether there was an idle adapter that had a slot."""
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
        packed: the adapter.
        slot: where it is on the device, if it is.
        num_running: sequences that run on it.
    """

    tier: DeviceTier
    packed: Packed
    slot: int | None = None
    num_running: int = 0

    @property
    def current(self) -> Tier:
        """Where it is now."""
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
