"""``AdapterSlots`` on CUDA: adapters packed in host memory, copied to one buffer on a device, found by records."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.memory import ArenaMemory
from manyhats.engine.backends.cuda.adapters.packed import PackedAdapter
from manyhats.engine.backends.cuda.adapters.packing import pack_adapter
from manyhats.engine.backends.cuda.runtime import Runtime
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.model.architecture import Architecture


class CudaAdapterSlots:
    """Slots whose records and numbers are on a device; on the CPU, which tests use, it works the same.

    Args:
        architecture: of the base.
        num_slots: slot 0, which stays empty, included.
        num_bytes: of the device's buffer for adapters.
        largest: the largest sizes that may be packed.
        runtime: of the device.

    Attributes:
        layout: of the records.
        memory: of the device.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_slots: int,
        num_bytes: int,
        largest: LargestSizes,
        runtime: Runtime,
    ) -> None:
        self.layout = RecordLayout(architecture)
        self.memory = ArenaMemory(num_slots, self.layout.num_words, num_bytes, runtime)
        self._largest = largest
        self._is_pinned = runtime.device.type == "cuda"
        self._placed: dict[int, PackedAdapter] = {}

    @property
    def records(self) -> Tensor:
        """[slots, words] int64, on the device."""
        return self.memory.records

    def pack(self, adapter: LoweredAdapter) -> PackedAdapter:
        """Lays out an adapter in host memory, from which placing it again is one copy."""
        return pack_adapter(adapter, self.layout, self._largest, pinned=self._is_pinned)

    def place(self, slot: int, packed: PackedAdapter) -> None:
        """Copies an adapter to the device, and waits for the copy.

        Raises:
            ArenaFullError: the buffer has no room for it.
        """
        self.memory.put(slot, packed)
        self._placed[slot] = packed

    def clear(self, slot: int) -> None:
        """Empties a slot, whose part of the buffer others may have then."""
        self._placed.pop(slot, None)
        self.memory.take_back(slot)

    @property
    def num_slots(self) -> int:
        """Slot 0 included."""
        return self.records.shape[0]

    def acting(self, rows: AdapterRows) -> Acting:
        """What the adapters of a step's rows do; an empty slot does nothing."""
        placed = (self._placed.get(slot) for slot in np.unique(rows.slots).tolist())
        return Acting.most(each.acting for each in placed if each is not None)

    def by_vocabulary(self, rows: AdapterRows) -> tuple[AdapterRows, list[tuple[AdapterRows, int]]]:
        """Rows that choose among the base's tokens, and others: each task's, with the number of its tokens."""
        own = {slot: self._own_vocabulary(slot) for slot in np.unique(rows.slots).tolist()}
        others = [slot for slot, size in own.items() if size is not None]
        apart = [(_selected(rows, [slot]), size) for slot, size in own.items() if size is not None]
        return _selected(rows, [slot for slot in own if slot not in others]), apart

    def _own_vocabulary(self, slot: int) -> int | None:
        """Of a task whose adapter changes the head; other logits have the base's columns."""
        packed = self._placed.get(slot)
        return packed.vocab_size if packed is not None and packed.acting.changes_head else None


def _selected(rows: AdapterRows, slots: list[int]) -> AdapterRows:
    kept = np.isin(rows.slots, slots)
    return AdapterRows(rows.rows[kept], rows.slots[kept], len(slots))
