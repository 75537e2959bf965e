"""How much of a GPU's memory the placed adapters take: numbers alone, since torch itself finds their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhats.engine.backends.torch.batched.adapters import HostAdapter


class CountedMemory:
    """``AdapterMemory`` by a count of bytes.

    Args:
        num_bytes: that adapters may take.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_copied_bytes = 0
        self._taken: dict[int, int] = {}

    @property
    def num_free_bytes(self) -> int:
        """Which no adapter has."""
        return self.num_bytes - sum(list(self._taken.values()))

    def bytes_of(self, packed: HostAdapter) -> int:
        """Its buffer's."""
        return packed.num_bytes

    def evictions(self, num_bytes: int, idle: Sequence[int]) -> Sequence[int] | None:
        """The first slots that together have what is missing."""
        missing = num_bytes - self.num_free_bytes
        for count, slot in enumerate(idle):
            if missing <= 0:
                return idle[:count]
            missing -= self._taken[slot]
        return idle if missing <= 0 else None

    def take(self, slot: int, num_bytes: int) -> None:
        """Note that an adapter is copied into a slot.

        Raises:
            MemoryError: there is no room for it.
        """
        if num_bytes > self.num_free_bytes:
            raise MemoryError(
                f"{num_bytes} bytes are needed; {self.num_free_bytes} of {self.num_bytes} are free"
            )
        self._taken[slot] = num_bytes
        self.num_copied_bytes += num_bytes

    def give_back(self, slot: int) -> None:
        """Note that a slot is empty."""
        self._taken.pop(slot, None)
