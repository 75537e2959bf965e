"""Which adapters are loaded, and in which slots: pins those in use, evicts the least recently used."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.errors import AdapterCapacityError
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens

if TYPE_CHECKING:
    from manyhats.engine.backends.backend import AdapterSlots

LoadAdapter = Callable[[AdapterRecord], LoweredAdapter]
"""Reads an artifact and lowers it; may take long, and raises what makes it unfit."""


class PrefixPool(Protocol):
    """Knows where virtual tokens are in the KV cache; from any thread."""

    def add(self, prefix: KVPrefix | PromptEmbeddings) -> VirtualTokens:
        """Virtual tokens for requests to start with.

        Raises:
            EngineError: they can never be in the cache.
        """
        ...

    def remove(self, prefix: VirtualTokens) -> None:
        """Frees their blocks, at once or soon."""
        ...


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """A loaded adapter: the slot that its rows run on, and its virtual tokens if it has any.

    One that is virtual tokens alone has slot 0: its rows are the base's, and cost what those cost.
    """

    slot: int
    virtual: VirtualTokens | None = None


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Counts since the start, and bytes now."""

    num_loads: int
    num_evictions: int
    load_seconds: float
    resident_bytes: int


@dataclass(slots=True, eq=False)
class _Entry:
    """One adapter: ``loaded`` says when it is in ``slot``, or why not. ``pins`` counts requests by version's name."""

    slot: int
    loaded: Future[ResidentAdapter] = field(default_factory=Future)
    virtual: VirtualTokens | None = None
    pins: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    forgotten: bool = False

    @property
    def is_resident(self) -> bool:
        """Whether requests can run on it."""
        return self.loaded.done() and self.loaded.exception() is None


@dataclass(frozen=True, slots=True)
class Claim:
    """A pin on an adapter that may have to be loaded first.

    Attributes:
        loaded: what the request starts from, once it is there; the error gives the pin back.
        must_fill: whether the caller has to see that ``fill`` is called.
    """

    loaded: Future[ResidentAdapter]
    must_fill: bool


class AdapterResidency:
    """Slots by artifact digest, pins by version: versions of the same bytes share a slot. Safe from any thread.

    ``acquire`` and ``fill`` may load, so they never run on the engine's thread or the event loop; everything else
    returns at once.
    """

    def __init__(
        self,
        slots: AdapterSlots[Any],
        num_slots: int,
        max_bytes: int,
        load: LoadAdapter,
        prefixes: PrefixPool,
    ) -> None:
        self._slots = slots
        self._prefixes = prefixes
        self._free = list(range(num_slots, 0, -1))
        self._max_bytes = max_bytes
        self._load = load
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._stats = ResidencyStats(0, 0, 0.0, 0)
        self._on_room: Callable[[], None] = lambda: None
        self.num_slots = num_slots

    @property
    def stats(self) -> ResidencyStats:
        """A snapshot."""
        return self._stats

    def call_on_room(self, callback: Callable[[], None]) -> None:
        """Has ``callback`` called, on any thread, whenever a slot may have come free."""
        self._on_room = callback

    def resident_digests(self) -> frozenset[str]:
        """Digests of the adapters that a request could run on at once."""
        with self._lock:
            return frozenset(d for d, e in self._entries.items() if e.is_resident and not e.forgotten)

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request is pinned to this version; another one of the same bytes does not count."""
        with self._lock:
            entry = self._entries.get(record.digest)
            return entry is not None and entry.pins[record.name] > 0

    def try_acquire(self, record: AdapterRecord) -> ResidentAdapter | None:
        """Pins a loaded adapter and returns it; None if it isn't loaded."""
        with self._lock:
            entry = self._entries.get(record.digest)
            if entry is None or not entry.is_resident:
                return None
            self._pin(record, entry)
            return entry.loaded.result()

    def claim(self, record: AdapterRecord, *, may_take_slot: bool = True) -> Claim | None:
        """Pins an adapter that is loaded, or being loaded, or for which there is a slot; None if there is none.

        Args:
            record: the version.
            may_take_slot: False for one that is loaded or being loaded already, or none.
        """
        with self._lock:
            entry = self._entries.get(record.digest)
            is_new = entry is None
            if entry is None:
                if not may_take_slot or not self._has_slot():
                    return None
                entry = self._entries[record.digest] = _Entry(self._free.pop())
                entry.loaded.set_running_or_notify_cancel()  # nobody who waits for it can cancel it
            self._pin(record, entry)
            return Claim(entry.loaded, is_new)

    def acquire(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> ResidentAdapter:
        """Pins an adapter, loading it first where needed, and returns it.

        Callers that ask for one that is being loaded wait for that load.

        Args:
            record: the version.
            lowered: what it comes to, where that is at hand; None reads it.

        Raises:
            AdapterCapacityError: every slot holds an adapter that is in use.
            AdapterError: the artifact cannot be loaded.
        """
        claim = self.claim(record)
        if claim is None:
            raise AdapterCapacityError(self.num_slots)
        if claim.must_fill:
            self.fill(record, lowered)
        return claim.loaded.result()

    def fill(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        """Loads what was claimed; how that ends, its future says. No other adapter waits for it."""
        with self._lock:
            entry = self._entries[record.digest]
        started = time.monotonic()
        try:
            resident = self._loaded(record, entry, lowered)
        except BaseException as error:  # noqa: BLE001 whatever it was, those who wait must see it
            self.give_up(record, error)
            return
        with self._lock:
            if entry.virtual is not None:
                entry.num_bytes += entry.virtual.num_bytes
            stats = self._stats
            self._stats = replace(
                stats,
                num_loads=stats.num_loads + 1,
                load_seconds=stats.load_seconds + time.monotonic() - started,
                resident_bytes=stats.resident_bytes + entry.num_bytes,
            )
            while self._stats.resident_bytes > self._max_bytes and self._evict():
                pass
        entry.loaded.set_result(resident)
        self._on_room()

    def give_up(self, record: AdapterRecord, error: BaseException) -> None:
        """Ends with an error what was claimed and not filled; all its pins are gone."""
        with self._lock:
            entry = self._entries[record.digest]
            self._drop(record.digest)
        entry.loaded.set_exception(error)
        self._on_room()

    def release(self, record: AdapterRecord) -> None:
        """Undoes one ``acquire``, or one ``claim`` that was filled; the adapter stays until its slot is needed."""
        with self._lock:
            entry = self._entries[record.digest]
            entry.pins[record.name] -= 1
            if not entry.pins[record.name]:
                del entry.pins[record.name]
            is_idle = not entry.pins
            if entry.forgotten and is_idle:
                self._drop(record.digest)
        if is_idle:
            self._on_room()

    def forget(self, digest: str) -> None:
        """Frees an adapter's memory, once the requests that run on it have finished."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return
            entry.forgotten = True
            if entry.pins:
                return
            self._drop(digest)
        self._on_room()

    def _pin(self, record: AdapterRecord, entry: _Entry) -> None:
        entry.pins[record.name] += 1
        entry.forgotten = False  # registered again
        self._entries.move_to_end(record.digest)

    def _loaded(
        self, record: AdapterRecord, entry: _Entry, lowered: LoweredAdapter | None
    ) -> ResidentAdapter:
        lowered = lowered or self._load(record)
        packed = self._slots.pack(lowered)
        self._slots.place(entry.slot, packed)
        entry.num_bytes = packed.num_bytes
        if lowered.prefix is not None:
            entry.virtual = self._prefixes.add(lowered.prefix)
        is_prefix_alone = lowered.prefix is not None and not lowered.deltas
        return ResidentAdapter(0 if is_prefix_alone else entry.slot, entry.virtual)

    def _has_slot(self) -> bool:
        return bool(self._free) or self._evict()

    def _evict(self) -> bool:
        """Drops the least recently used adapter that nobody uses; whether there was one."""
        for digest, entry in self._entries.items():
            if not entry.pins:
                self._drop(digest)
                self._stats = replace(self._stats, num_evictions=self._stats.num_evictions + 1)
                return True
        return False

    def _drop(self, digest: str) -> None:
        entry = self._entries.pop(digest)
        self._slots.clear(entry.slot)
        if entry.virtual is not None:
            self._prefixes.remove(entry.virtual)
        self._free.append(entry.slot)
        self._stats = replace(self._stats, resident_bytes=self._stats.resident_bytes - entry.num_bytes)
