"""Steps that are scheduled and not committed: what they may still read or write is given up once they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.sequence import Placement, Sequence, SequenceStatus

MAX_IN_FLIGHT = 2
"""One that is launched, and the one before it, which is then committed."""


@dataclass(slots=True, eq=False)
class Flight:
    """A step in flight.

    Attributes:
        schedule: of the step.
        began_s: when it was scheduled, on the scheduler's clock.
        is_counted_on: whether the next one may be scheduled as if it had run.
        choosing: sequences to which it gives a token that the next one runs.
        blocks: references that are dropped once it is committed.
        placements: those that sequences leave then.
    """

    schedule: Schedule
    began_s: float
    is_counted_on: bool = False
    choosing: set[Sequence] = field(default_factory=set)
    blocks: list[int] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)

    def count_on(self) -> None:
        """Count its tokens as computed, and those that it chooses as there."""
        for chunk in self._running_chunks():
            sequence = chunk.sequence
            # A token that brings the sequence to its maximum ends it, and is not run.
            if chunk.ends_tokens and sequence.num_expected_tokens + 1 < sequence.max_num_tokens:
                sequence.num_unknown_tokens += 1
                self.choosing.add(sequence)
            sequence.num_launched_tokens += chunk.num_tokens
        self.is_counted_on = True

    def count_no_more_on(self) -> None:
        """Undo that, if it was done."""
        if not self.is_counted_on:
            return
        for chunk in self._running_chunks():
            chunk.sequence.num_launched_tokens -= chunk.num_tokens
            chunk.sequence.num_unknown_tokens -= chunk.sequence in self.choosing

    def _running_chunks(self) -> Iterator[Chunk]:
        """Those of sequences that have not stopped since, and so lost what is in flight of them."""
        return (chunk for chunk in self.schedule.chunks if chunk.sequence.status is SequenceStatus.RUNNING)


class InFlight:
    """The steps in flight, the oldest first. Belongs to the scheduler.

    What is given up meanwhile waits for the newest of them, whether or not that one names it: at worst it is free one
    step later than it could be.

    Args:
        allocator: of the blocks.
        clock: monotonic seconds.
    """

    def __init__(self, allocator: BlockAllocator, clock: Callable[[], float]) -> None:
        self._allocator = allocator
        self._clock = clock
        self._flights: list[Flight] = []
        self._landed_s = -math.inf

    def __bool__(self) -> bool:
        return bool(self._flights)

    @property
    def may_begin(self) -> bool:
        """Whether another step may be scheduled."""
        return not self._flights or (len(self._flights) < MAX_IN_FLIGHT and self._flights[-1].is_counted_on)

    @property
    def has_drafts(self) -> bool:
        """Whether it is not known how many tokens the newest gives its sequences."""
        return bool(self._flights) and self._flights[-1].schedule.num_drafts > 0

    @property
    def oldest(self) -> Flight | None:
        """The one that is committed next, unless a later one fails."""
        return self._flights[0] if self._flights else None

    def of(self, schedule: Schedule) -> Flight | None:
        """The flight of a schedule; None if it is over, or had no chunks."""
        return next((flight for flight in self._flights if flight.schedule is schedule), None)

    def begin(self, schedule: Schedule) -> None:
        """A step is scheduled."""
        self._flights.append(Flight(schedule, self._clock()))

    def seconds(self, flight: Flight) -> float:
        """What a step that has run added to the time: from its beginning, or from the end of the one before it."""
        now_s = self._clock()
        began_s = max(flight.began_s, self._landed_s)
        self._landed_s = now_s
        return now_s - began_s

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop references as soon as no step in flight can name the blocks."""
        if self._flights:
            self._flights[-1].blocks.extend(block_ids)
        else:
            self._allocator.free(block_ids)

    def leave(self, placement: Placement) -> None:
        """Leave a placement as soon as no step in flight can name its slot."""
        if self._flights:
            self._flights[-1].placements.append(placement)
        else:
            placement.leave()

    def land(self, flight: Flight) -> None:
        """Nothing of a step runs any more. What waited for one that never ran may be named by the one before it."""
        is_newest = flight is self._flights[-1]
        self._flights.remove(flight)
        if is_newest and self._flights:
            self._flights[-1].blocks += flight.blocks
            self._flights[-1].placements += flight.placements
            return
        self._allocator.free(flight.blocks)
        for placement in flight.placements:
            placement.leave()

    def clear(self) -> None:
        """Forget all of them, which run no more; whoever holds blocks is forgotten elsewhere."""
        for flight in self._flights:
            for placement in flight.placements:
                placement.leave()
        self._flights.clear()
