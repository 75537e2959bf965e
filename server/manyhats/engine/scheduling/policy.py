"""Which sequence is next: by (priority, arrival), preempted and resumed ones first within their priority.

The engine's own sequences (``is_internal``) are few and short, and threads wait for them: they go before every request,
and neither ``max_waiting`` nor ``max_num_sequences`` applies to them. In return, a step in which others decode takes
few of their tokens, so that it grows by half at most.

``max_waiting`` refuses requests on arrival only. It refuses none that has already waited for its adapter, and none of
the continuations of a scoring that has begun, which steady newcomers could otherwise keep out for good.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus

Rank = tuple[int, float, int]
"""(-priority, arrival, order of adding); smaller goes first."""

_INTERNAL_PRIORITY = 2**31
"""Above every request's."""


class Queue:
    """Ranks every sequence from ``add`` to ``forget``, and holds those that wait, the next one first.

    Attributes:
        num_counted: those that wait and count towards ``max_waiting``.
        num_short: those that wait and are not bulk (``Step``).
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._ranks: dict[Sequence, Rank] = {}
        self._waiting: list[Sequence] = []  # sorted by _waiting_rank
        self._num_added = 0
        self.num_counted = 0
        self.num_short = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """A snapshot of those that wait, in the order in which they are to start."""
        return iter(tuple(self._waiting))

    def rank(self, sequence: Sequence) -> Rank:
        """The sequence's place among all unfinished ones."""
        return self._ranks[sequence]

    def add(self, sequence: Sequence) -> None:
        """Rank a new sequence after its equals; it waits."""
        priority = _INTERNAL_PRIORITY if sequence.is_internal else sequence.priority
        self._ranks[sequence] = (-priority, sequence.arrival, self._num_added)
        self._num_added += 1
        self.enter(sequence)

    def enter(self, sequence: Sequence) -> None:
        """Note that a sequence is waiting, for the first time or again."""
        sequence.status = SequenceStatus.WAITING
        self._count(sequence, +1)
        insort(self._waiting, sequence, key=self._waiting_rank)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence no longer waits; it keeps its rank."""
        self._count(sequence, -1)
        del self._waiting[bisect_left(self._waiting, self._waiting_rank(sequence), key=self._waiting_rank)]

    def forget(self, sequence: Sequence) -> None:
        """Drop the rank of a sequence that has finished, and does not wait. Safe to repeat."""
        self._ranks.pop(sequence, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._ranks.clear()
        self._waiting.clear()
        self.num_counted = self.num_short = 0

    def _count(self, sequence: Sequence, change: int) -> None:
        self.num_counted += change * sequence.is_counted
        self.num_short += change * (not self._config.is_bulk(sequence, sequence.num_tokens))

    def _waiting_rank(self, sequence: Sequence) -> tuple[int, bool, float, int]:
        priority, arrival, order = self._ranks[sequence]
        return (priority, sequence.num_preemptions == 0, arrival, order)
