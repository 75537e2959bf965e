"""Which adapters are in memory: keeps those held or pinned, and evicts the least recently used of the others."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.errors import FieldInvalidError, PinLimitError
from manyhats.engine.residency.lease import Lease, ResidentAdapter
from manyhats.engine.residency.tiers import DeviceBytes, DeviceTier, PlacedAdapter, Tier
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from manyhats.engine.threads.background import background_threads

if TYPE_CHECKING:
    from manyhats.engine.backends.backend import AdapterSlots, Packed

MAX_LOADS = 2
"""Adapters loaded at a time. Their sizes are only known at the end, so ``max_bytes`` may be exceeded by these."""

LoadAdapter = Callable[[AdapterRecord], LoweredAdapter]
"""Reads an artifact and lowers it; may take long, and raises if it cannot be served."""


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Counts since the start, with evictions from memory and from slots separate, and the current bytes.

    ``pinned_bytes`` are those of ``resident_bytes`` that stay; ``device`` is of a device with memory of its own.
    """

    num_loads: int
    num_evictions: int
    num_slot_evictions: int
    load_seconds: float
    resident_bytes: int
    pinned_bytes: int = 0
    device: DeviceBytes | None = None


class AdapterResidency:
    """Adapters by artifact digest, leases by version: versions with the same bytes share one. Thread-safe.

    An adapter is read, lowered and packed once, and then stays in host memory while there is room. From there it goes
    into a slot when one of its sequences starts (``DeviceTier``). ``fill`` loads, so it never runs on the engine's
    thread or the event loop; everything else returns at once.

    Args:
        slots: the backend's.
        num_slots: how many of them adapters use, from slot 1 on.
        max_bytes: of adapters in memory; leased ones stay, whatever they take, and pinned ones take no more than that.
        load: reads and lowers them.
        kv_capacity: of the KV cache, in tokens.
        forget: frees the blocks of virtual tokens, at once or soon.
        wake: called, on any thread, when there may be a slot for a sequence that waits for a copy.

    Attributes:
        device: which adapters have slots.
    """

    def __init__(
        self,
        slots: AdapterSlots[Any],
        num_slots: int,
        max_bytes: int,
        load: LoadAdapter,
        kv_capacity: int,
        forget: Callable[[VirtualTokens], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._slots = slots
        self.device = DeviceTier(slots, num_slots, background_threads(1, "adapter-copier"), wake)
        self._load = load
        self._kv_capacity = kv_capacity
        self._forget_virtual = forget
        self._adapters: OrderedDict[str, ResidentAdapter] = OrderedDict()  # least recently used first
        self._held: set[ResidentAdapter] = set()
        self._loading: set[str] = set()
        self._lock = threading.Lock()
        self._stats = ResidencyStats(0, 0, 0, 0.0, 0)
        self._on_room: Callable[[], None] = lambda: None
        self.max_bytes = max_bytes

    @property
    def stats(self) -> ResidencyStats:
        """A snapshot."""
        with self._lock:
            return replace(
                self._stats,
                num_slot_evictions=self.device.num_evictions,
                pinned_bytes=self._pinned_bytes,
                device=self.device.num_bytes,
            )

    @property
    def _pinned_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._adapters.values() if adapter.is_pinned)

    def close(self) -> None:
        """Copy nothing more to the device, once no step runs."""
        self.device.close()

    def call_on_room(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, on any thread, whenever there may be room for one more adapter."""
        self._on_room = callback

    def tiers(self) -> dict[str, Tier]:
        """Digest → tier of each loaded adapter; one that needs no slot counts as having one."""
        with self._lock:
            return {
                digest: Tier.DEVICE if adapter.placement is None else adapter.placement.current
                for digest, adapter in self._adapters.items()
                if adapter.is_loaded and not adapter.is_forgotten
            }

    def without_slot(self) -> frozenset[str]:
        """The names of versions that requests hold, and that are loaded but have no slot."""
        with self._lock:
            return frozenset(
                name
                for adapter in self._held
                if adapter.placement is not None and adapter.placement.slot is None
                for name in adapter.leases
            )

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a request holds this version; another with the same bytes does not count."""
        with self._lock:
            adapter = self._adapters.get(record.digest)
            return adapter is not None and adapter.leases[record.name] > 0

    def try_lease(self, record: AdapterRecord) -> Lease | None:
        """Lease a loaded adapter; None if it isn't loaded."""
        with self._lock:
            adapter = self._adapters.get(record.digest)
            return self._lease(record, adapter) if adapter is not None and adapter.is_loaded else None

    def lease(self, record: AdapterRecord, begin: Callable[[], None] | None) -> Lease | None:
        """Lease an adapter that is loaded, being loaded, or has room to be; None otherwise.

        Args:
            record: the version.
            begin: called to have ``fill`` called if the adapter must be loaded first; None to not load it.
        """
        with self._lock:
            adapter = self._adapters.get(record.digest)
            if adapter is not None:
                return self._lease(record, adapter)
            if begin is None or not self._has_room():
                return None
            adapter = self._adapters[record.digest] = ResidentAdapter()
            adapter.loaded.set_running_or_notify_cancel()  # nobody waiting for it can cancel it
            self._loading.add(record.digest)
            lease = self._lease(record, adapter)
        begin()
        return lease

    def fill(self, record: AdapterRecord, lowered: LoweredAdapter | None = None) -> None:
        """Load what was leased; its future says how that ends. No other adapter waits for it.

        Args:
            record: the version.
            lowered: the lowered adapter if already known; None reads it from the store.
        """
        with self._lock:
            adapter = self._adapters[record.digest]
        started = time.monotonic()
        try:
            packed = self._pack(adapter, lowered or self._load(record))
            with self._lock:
                self._account(adapter, packed, time.monotonic() - started)
            if adapter.placement is not None:
                self.device.fill_free(adapter.placement)
        except BaseException as error:  # noqa: BLE001 whatever it was, those who wait must see it
            self.give_up(record, error)
            return
        with self._lock:
            self._loading.discard(record.digest)
            adapter.is_loaded = True
        adapter.loaded.set_result(None)
        self._on_room()

    def give_up(self, record: AdapterRecord, error: BaseException) -> None:
        """End with an error what was leased and not filled; all its leases are void."""
        with self._lock:
            adapter = self._drop(record.digest)
            self._loading.discard(record.digest)
        adapter.loaded.set_exception(error)
        self._on_room()

    def pin(self, digest: str) -> None:
        """Keep a leased adapter in memory until ``unpin``, or until it is forgotten.

        Raises:
            PinLimitError: all pinned ones together would exceed ``max_bytes``.
        """
        with self._lock:
            adapter = self._adapters[digest]
            pinned_bytes = self._pinned_bytes
            if not adapter.is_pinned and pinned_bytes + adapter.num_bytes > self.max_bytes:
                raise PinLimitError(adapter.num_bytes, pinned_bytes, self.max_bytes)
            adapter.is_pinned = True

    def unpin(self, digest: str) -> None:
        """Let an adapter make room for others again."""
        with self._lock:
            adapter = self._adapters.get(digest)
            if adapter is not None:
                adapter.is_pinned = False
        self._on_room()

    def pinned(self) -> frozenset[str]:
        """Digests of the pinned adapters."""
        with self._lock:
            return frozenset(digest for digest, adapter in self._adapters.items() if adapter.is_pinned)

    def forget(self, digest: str) -> None:
        """Free an adapter's memory once the requests that hold it have finished."""
        with self._lock:
            adapter = self._adapters.get(digest)
            if adapter is None:
                return
            adapter.is_forgotten, adapter.is_pinned = True, False
            if adapter.leases:
                return
            self._drop(digest)
        self._on_room()

    def _lease(self, record: AdapterRecord, adapter: ResidentAdapter) -> Lease:
        adapter.leases[record.name] += 1
        self._held.add(adapter)
        adapter.is_forgotten = False  # registered again
        self._adapters.move_to_end(record.digest)
        return Lease(adapter, partial(self._release, record, adapter))

    def _release(self, record: AdapterRecord, adapter: ResidentAdapter) -> None:
        with self._lock:
            if self._adapters.get(record.digest) is not adapter:
                return  # it could not be loaded
            adapter.leases[record.name] -= 1
            if not adapter.leases[record.name]:
                del adapter.leases[record.name]
            is_idle = not adapter.leases
            if is_idle:
                self._held.discard(adapter)
                if adapter.is_forgotten:
                    self._drop(record.digest)
                # But for itself: beside pinned ones that fill the memory, it would be loaded for each request.
                self._shrink(but=record.digest)
        if is_idle:
            self._on_room()

    def _pack(self, adapter: ResidentAdapter, lowered: LoweredAdapter) -> Packed:
        """Pack its matrices and virtual tokens.

        Raises:
            FieldInvalidError: the KV cache cannot hold its virtual tokens and one more token.
            AdapterTooLargeError: the device's memory for adapters cannot hold it.
        """
        packed: Packed = self._slots.pack(lowered)
        self.device.check_fits(packed)
        prefix = lowered.prefix
        if prefix is not None and prefix.num_virtual_tokens >= self._kv_capacity:
            raise FieldInvalidError(
                "num_virtual_tokens",
                f"are {prefix.num_virtual_tokens}; the KV cache holds {self._kv_capacity} tokens in total",
            )
        adapter.virtual = None if prefix is None else VirtualTokens(prefix)
        adapter.head = lowered.head
        adapter.vocab_size = lowered.vocab_size
        if lowered.deltas or (prefix is None and lowered.head is None):
            adapter.placement = PlacedAdapter(self.device, packed)
        return packed

    def _account(self, adapter: ResidentAdapter, packed: Packed, seconds: float) -> None:
        stats, virtual = self._stats, adapter.virtual
        tensors = () if adapter.head is None else adapter.head.tensors
        adapter.num_bytes = packed.num_bytes + (0 if virtual is None else virtual.num_bytes)
        adapter.num_bytes += sum(tensor.nbytes for tensor in tensors)
        self._stats = replace(
            stats,
            num_loads=stats.num_loads + 1,
            load_seconds=stats.load_seconds + seconds,
            resident_bytes=stats.resident_bytes + adapter.num_bytes,
        )
        self._shrink()

    def _shrink(self, but: str = "") -> None:
        """Keep to the memory: loads may have gone beyond it while everything was in use."""
        while self._stats.resident_bytes > self.max_bytes and self._evict(but):
            pass

    def _has_room(self) -> bool:
        """Whether one more may be loaded, whose size is unknown.

        Beside pinned ones that fill the memory, one at a time may: else it would wait for as long as they are pinned.
        """
        if len(self._loading) >= MAX_LOADS:
            return False
        while self._stats.resident_bytes >= self.max_bytes:
            if not self._evict():
                return all(adapter.is_pinned for adapter in self._adapters.values())
        return True

    def _evict(self, but: str = "") -> bool:
        """Drop the least recently used adapter that may go, ``but`` one; returns whether there was one."""
        for digest, adapter in self._adapters.items():
            if adapter.is_evictable and digest != but:
                self._drop(digest)
                self._stats = replace(self._stats, num_evictions=self._stats.num_evictions + 1)
                return True
        return False

    def _drop(self, digest: str) -> ResidentAdapter:
        adapter = self._adapters.pop(digest)
        self._held.discard(adapter)
        if adapter.placement is not None:
            self.device.remove(adapter.placement)
        if adapter.virtual is not None:
            self._forget_virtual(adapter.virtual)
        self._stats = replace(self._stats, resident_bytes=self._stats.resident_bytes - adapter.num_bytes)
        return adapter
