"""Which adapters are loaded, and in which slots: pins those in use, evicts the least recently used."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.engine.errors import AdapterCapacityError
from manyhats.engine.kernels.interface import AdapterSlots
from manyhats.engine.prefix import VirtualTokens

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
    """One adapter: loading until ``ready`` is set, then in ``slot`` unless ``error`` says why not."""

    slot: int
    ready: threading.Event
    virtual: VirtualTokens | None = None
    pins: int = 0
    num_bytes: int = 0
    is_prefix_alone: bool = False
    forgotten: bool = False
    error: BaseException | None = None

    @property
    def resident(self) -> ResidentAdapter:
        """What a request starts from."""
        return ResidentAdapter(0 if self.is_prefix_alone else self.slot, self.virtual)


class AdapterResidency:
    """Slots by artifact digest. Safe from any thread.

    ``acquire`` may load, so it never runs on the engine's thread or the event loop; ``try_acquire`` and
    ``release`` return at once.
    """

    def __init__(
        self, slots: AdapterSlots, num_slots: int, max_bytes: int, load: LoadAdapter, prefixes: PrefixPool
    ) -> None:
        self._slots = slots
        self._prefixes = prefixes
        self._free = list(range(num_slots, 0, -1))
        self._max_bytes = max_bytes
        self._load = load
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._stats = ResidencyStats(0, 0, 0.0, 0)

    @property
    def stats(self) -> ResidencyStats:
        """A snapshot."""
        return self._stats

    def resident_digests(self) -> frozenset[str]:
        """Digests of the adapters that a request could run on at once."""
        with self._lock:
            return frozenset(d for d, e in self._entries.items() if e.ready.is_set() and not e.forgotten)

    def in_use(self, digest: str) -> bool:
        """Whether a request is pinned to it."""
        with self._lock:
            entry = self._entries.get(digest)
            return entry is not None and entry.pins > 0

    def try_acquire(self, digest: str) -> ResidentAdapter | None:
        """Pins a loaded adapter and returns it; None if it isn't loaded."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or not entry.ready.is_set() or entry.error is not None:
                return None
            self._pin(digest, entry)
            return entry.resident

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
        with self._lock:
            entry = self._entries.get(record.digest)
            owner = entry is None
            if entry is None:
                entry = _Entry(self._take_slot(), threading.Event())
                self._entries[record.digest] = entry
            self._pin(record.digest, entry)
        if owner:
            self._fill(record, entry, lowered)
        entry.ready.wait()
        if entry.error is not None:
            raise entry.error
        return entry.resident

    def release(self, digest: str) -> None:
        """Undoes one ``acquire``; the adapter stays loaded until its slot is needed."""
        with self._lock:
            entry = self._entries[digest]
            entry.pins -= 1
            if entry.forgotten and not entry.pins:
                self._drop(digest)

    def forget(self, digest: str) -> None:
        """Frees an adapter's memory, once the requests that run on it have finished."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return
            entry.forgotten = True
            if not entry.pins:
                self._drop(digest)

    def _pin(self, digest: str, entry: _Entry) -> None:
        entry.pins += 1
        entry.forgotten = False  # registered again
        self._entries.move_to_end(digest)

    def _fill(self, record: AdapterRecord, entry: _Entry, lowered: LoweredAdapter | None) -> None:
        """Loads outside the lock, so that no other adapter waits for this one."""
        started = time.monotonic()
        try:
            lowered = lowered or self._load(record)
            self._slots.write(entry.slot, lowered)
            entry.is_prefix_alone = lowered.prefix is not None and not lowered.deltas
            if lowered.prefix is not None:
                entry.virtual = self._prefixes.add(lowered.prefix)
        except BaseException as error:
            with self._lock:
                entry.error = error
                self._drop(record.digest)
            entry.ready.set()
            raise
        with self._lock:
            entry.num_bytes = self._slots.num_bytes(entry.slot)
            if entry.virtual is not None:
                entry.num_bytes += entry.virtual.num_bytes
            stats = self._stats
            self._stats = replace(
                stats,
                num_loads=stats.num_loads + 1,
                load_seconds=stats.load_seconds + time.monotonic() - started,
                resident_bytes=stats.resident_bytes + entry.num_bytes,
            )
            entry.ready.set()
            while self._stats.resident_bytes > self._max_bytes and self._evict():
                pass

    def _take_slot(self) -> int:
        if not self._free and not self._evict():
            raise AdapterCapacityError(len(self._entries))
        return self._free.pop()

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
