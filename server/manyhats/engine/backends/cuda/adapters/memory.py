"""The device's memory of adapters: one buffer, in which each slot's adapter has a region, and the slots' records."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.packed import PackedAdapter
from manyhats.engine.backends.cuda.arena import Arena, Region, aligned
from manyhats.engine.backends.cuda.failures import reported
from manyhats.engine.backends.cuda.runtime import Runtime

COPY_BYTES = 8 * 1024 * 1024
"""Copied at a time, so that what a step uploads never waits for a whole adapter."""


class ArenaMemory:
    """``AdapterMemory`` of the buffer; copies go through a stream of their own. Thread-safe.

    Args:
        num_slots: slot 0, which stays empty, included.
        num_words: of a record.
        num_bytes: of the buffer.
        runtime: of the device.
        copy_bytes: copied at a time.

    Attributes:
        records: [slots, words] int64, on the device; an empty slot's is 0.
        buffer: [bytes] uint8, on the device.
        num_copied_bytes: of adapters, since the start.
    """

    def __init__(
        self, num_slots: int, num_words: int, num_bytes: int, runtime: Runtime, copy_bytes: int = COPY_BYTES
    ) -> None:
        self.records = torch.zeros(num_slots, num_words, dtype=torch.int64, device=runtime.device)
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=runtime.device)
        self.num_bytes = sum(region.num_bytes for region in Arena(num_bytes).free_regions)
        self.num_copied_bytes = 0
        self._arena = Arena(num_bytes)
        self._regions: dict[int, Region] = {}
        self._lock = threading.Lock()
        self._copying = (
            threading.Lock()
        )  # held while a copy is waited for, which nothing but another copy needs
        self._runtime = runtime
        self._copy_bytes = copy_bytes
        self._record = runtime.host_memory(num_words * 8)
        self._zeros = runtime.host_memory(num_words * 8)
        self._zeros.array[:] = 0
        self._stream = runtime.new_stream()
        self._event = runtime.new_event()
        self._event.record()
        self._stream.wait(self._event)  # for the records' zeros

    @property
    def num_free_bytes(self) -> int:
        """Of the buffer, in all free regions."""
        with self._lock:
            return self._arena.num_free_bytes

    def bytes_of(self, packed: PackedAdapter) -> int:
        """Of its region."""
        return aligned(packed.numbers.numel())

    def evictions(self, num_bytes: int, idle: Sequence[int]) -> list[int] | None:
        """The slots whose regions make a hole that is large enough."""
        with self._lock:
            regions = [self._regions[slot] for slot in idle]
            evicted = self._arena.evictions(num_bytes, regions)
        if evicted is None:
            return None
        return [slot for slot, region in zip(idle, regions, strict=True) if region in evicted]

    def put(self, slot: int, packed: PackedAdapter) -> None:
        """Copy an adapter into a region and its record into a slot, and wait for both.

        Raises:
            ArenaFullError: the buffer has no room for it.
        """
        with self._copying:
            with self._lock:
                assert slot not in self._regions, "a slot is cleared before it is used again"
                region = self._arena.allocate(packed.numbers.numel())
            try:
                with reported():
                    self._copy(slot, packed, region)
            except BaseException:
                with self._lock:
                    self._arena.free(region)
                raise
            with self._lock:
                self._regions[slot] = region
            self.num_copied_bytes += packed.numbers.numel()

    def take_back(self, slot: int) -> None:
        """Empty a slot, whose region others may have then; later copies come after this one's zeros."""
        with self._lock:
            region = self._regions.pop(slot, None)
            if region is not None:
                self._runtime.copy(self._record_of(slot), self._zeros.tensor, self._stream)
                self._arena.free(region)

    def _copy(self, slot: int, packed: PackedAdapter, region: Region) -> None:
        """The record last, which makes the numbers known."""
        copy, stream = self._runtime.copy, self._stream
        record = packed.record_at(self.buffer.data_ptr() + region.begin)
        self._record.array[:] = record.view(np.uint8)
        try:
            for begin in range(0, packed.numbers.numel(), self._copy_bytes):
                part = packed.numbers[begin : begin + self._copy_bytes]
                at = region.begin + begin
                copy(self.buffer[at : at + part.numel()], part, stream)
            copy(self._record_of(slot), self._record.tensor, stream)
        finally:
            self._event.record(stream)
            self._event.synchronize()

    def _record_of(self, slot: int) -> Tensor:
        return self.records[slot].view(torch.uint8)
