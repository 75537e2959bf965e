"""Regions of one device buffer, handed out and taken back without a call to the driver, which would wait."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; every region begins and ends at a multiple."""


class ArenaFullError(MemoryError):
    """No free region is large enough."""

    def __init__(self, num_bytes: int, largest_free: int) -> None:
        super().__init__(f"{num_bytes} bytes are needed; the largest free region has {largest_free}")


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A range of bytes."""

    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.begin + self.num_bytes


def aligned(num_bytes: int) -> int:
    """The bytes of a region of at least so many, and of at least one."""
    return max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT


class Arena:
    """Which regions of a buffer are free: the smallest that is large enough is given, and neighbours merge.

    The buffer itself is elsewhere. Not thread-safe.

    Args:
        num_bytes: of the buffer; what goes beyond a multiple of ``ALIGNMENT`` is never given.
    """

    def __init__(self, num_bytes: int) -> None:
        usable = num_bytes // ALIGNMENT * ALIGNMENT
        self._free = [Region(0, usable)] if usable else []  # by begin; no two touch
        self._used: dict[int, Region] = {}

    @property
    def free_regions(self) -> tuple[Region, ...]:
        """In their order."""
        return tuple(self._free)

    @property
    def num_free_bytes(self) -> int:
        """In all free regions."""
        return sum(region.num_bytes for region in self._free)

    def allocate(self, num_bytes: int) -> Region:
        """A region of at least so many bytes, and of at least one.

        Raises:
            ArenaFullError: none is large enough.
        """
        size = aligned(num_bytes)
        fitting = [region for region in self._free if region.num_bytes >= size]
        if not fitting:
            raise ArenaFullError(size, max((region.num_bytes for region in self._free), default=0))
        found = min(fitting, key=lambda region: (region.num_bytes, region.begin))
        at = self._free.index(found)
        rest = Region(found.begin + size, found.num_bytes - size)
        self._free[at : at + 1] = [rest] if rest.num_bytes else []
        given = self._used[found.begin] = Region(found.begin, size)
        return given

    def evictions(self, num_bytes: int, candidates: Sequence[Region]) -> list[Region] | None:
        """Which regions in use to take back so that ``allocate`` finds room; None if all are not enough.

        They are taken in their order until there is a hole that is large enough; those outside of it stay.

        Args:
            num_bytes: to be allocated.
            candidates: the regions that may be taken back, the first ones rather than later ones.
        """
        size = aligned(num_bytes)
        if any(region.num_bytes >= size for region in self._free):
            return []
        begins = {region.begin: region for region in self._free}
        ends = {region.end: region for region in self._free}
        for index, region in enumerate(candidates):
            begin = ends.pop(region.begin, region).begin
            end = begins.pop(region.end, region).end
            if end - begin >= size:
                return [each for each in candidates[: index + 1] if begin <= each.begin < end]
            begins[begin] = ends[end] = Region(begin, end - begin)
        return None

    def free(self, region: Region) -> None:
        """Take a region back.

        Raises:
            KeyError: it is not in use.
        """
        if self._used.get(region.begin) != region:
            raise KeyError(region)
        del self._used[region.begin]
        at = bisect_left(self._free, region)
        begin, end = region.begin, region.end
        first, last = at, at
        if at > 0 and self._free[at - 1].end == begin:
            first, begin = at - 1, self._free[at - 1].begin
        if at < len(self._free) and self._free[at].begin == end:
            last, end = at + 1, self._free[at].end
        self._free[first:last] = [Region(begin, end - begin)]
