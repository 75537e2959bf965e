"""``AdapterSlots`` on CUDA: adapters packed in host memory, copied to one buffer on a device, found by records."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.packed import PackedAdapter
from manyhats.engine.backends.cuda.adapters.packing import pack_adapter
from manyhats.engine.backends.cuda.arena import Arena, Region
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.model.architecture import Architecture

_COPY_BYTES = 8 * 1024 * 1024
"""Copied at a time, so that what a step uploads never waits for a whole adapter."""


class CudaAdapterSlots:
    """Slots whose records and numbers are on a device; on the CPU, which tests use, it works the same.

    Args:
        architecture: of the base.
        num_slots: slot 0, which stays empty, included.
        num_bytes: of the device's buffer for adapters.
        largest: the largest sizes that may be packed.
        device: where.

    Attributes:
        layout: of the records.
        records: [slots, words] int64, on the device.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_slots: int,
        num_bytes: int,
        largest: LargestSizes,
        device: torch.device,
    ) -> None:
        self.layout = RecordLayout(architecture)
        self.records = torch.zeros(num_slots, self.layout.num_words, dtype=torch.int64, device=device)
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._arena = Arena(num_bytes)
        self._largest = largest
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the records' zeros
        self._placed: dict[int, tuple[PackedAdapter, Region]] = {}
        self._lock = threading.Lock()

    def pack(self, adapter: LoweredAdapter) -> PackedAdapter:
        """Lays out an adapter in host memory."""
        return pack_adapter(adapter, self.layout, self._largest, pinned=self._is_cuda)

    def place(self, slot: int, packed: PackedAdapter) -> None:
        """Copies an adapter to the device, and waits for the copy.

        Raises:
            ArenaFullError: the buffer has no room for it.
        """
        with self._lock:
            assert slot not in self._placed, "a slot is cleared before it is used again"
            region = self._arena.allocate(packed.numbers.numel())
            try:
                self._copy(slot, packed, region)
            except BaseException:
                self._arena.free(region)
                raise
            self._placed[slot] = packed, region

    def _copy(self, slot: int, packed: PackedAdapter, region: Region) -> None:
        """The record last, which makes the numbers known."""
        record = torch.from_numpy(packed.record_at(self._memory.data_ptr() + region.begin))
        with self._copying():
            for begin in range(0, packed.numbers.numel(), _COPY_BYTES):
                part = packed.numbers[begin : begin + _COPY_BYTES]
                at = region.begin + begin
                self._memory[at : at + part.numel()].copy_(part, non_blocking=True)
            self.records[slot].copy_(record)

    def clear(self, slot: int) -> None:
        """Empties a slot, whose part of the buffer others may have then."""
        with self._lock:
            if slot in self._placed:
                with self._copying():
                    self.records[slot].zero_()
                _, region = self._placed.pop(slot)
                self._arena.free(region)

    @property
    def num_slots(self) -> int:
        """Slot 0 included."""
        return self.records.shape[0]

    @property
    def num_free_bytes(self) -> int:
        """Of the device's buffer."""
        return self._arena.num_free_bytes

    def acting(self, rows: AdapterRows) -> Acting:
        """What the adapters of a step's rows do; an empty slot does nothing."""
        placed = (self._placed.get(slot) for slot in np.unique(rows.slots).tolist())
        return Acting.most(each[0].acting for each in placed if each is not None)

    def by_vocabulary(self, rows: AdapterRows) -> tuple[AdapterRows, list[tuple[AdapterRows, int]]]:
        """Rows that choose among the base's tokens, and others: each task's, with the number of its tokens."""
        own = {slot: self._own_vocabulary(slot) for slot in np.unique(rows.slots).tolist()}
        others = [slot for slot, size in own.items() if size is not None]
        apart = [(_selected(rows, [slot]), size) for slot, size in own.items() if size is not None]
        return _selected(rows, [slot for slot in own if slot not in others]), apart

    def _own_vocabulary(self, slot: int) -> int | None:
        """Of a task whose adapter changes the head; other logits have the base's columns."""
        packed = self._placed[slot][0] if slot in self._placed else None
        return packed.vocab_size if packed is not None and packed.acting.changes_head else None

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies go through a stream of their own; none is under way afterwards."""
        if self._stream is None:
            yield
            return
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()


def _selected(rows: AdapterRows, slots: list[int]) -> AdapterRows:
    kept = np.isin(rows.slots, slots)
    return AdapterRows(rows.rows[kept], rows.slots[kept], len(slots))
