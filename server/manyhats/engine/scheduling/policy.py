"""Which sequence is next: by priority, then by what its task was served (``Shares``), then by arrival.

Preempted and resumed sequences go first within their priority. Running ones rank by (priority, arrival): what has begun
is not given up for a task that was served less.

The engine's own sequences (``is_internal``) are few and short, and threads wait for them: they go before every request,
and neither ``max_waiting`` nor ``max_num_sequences`` applies to them. In return, a step in which others decode takes
few of their tokens, so that it grows by half at most.

``max_waiting`` and ``max_waiting_tokens`` refuse requests on arrival only. They refuse none that has already waited for
its adapter, and none of the continuations of a scoring that has begun, which steady newcomers could otherwise keep out
for good. A task that has many waiting, or many tokens, is refused a little earlier than others: the queue's last places
are for those.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manyhats.engine.scheduling.limits import TaskLimits
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.shares import PROMPT_COST, Shares

Rank = tuple[int, float, int]
"""(-priority, arrival, order of adding); smaller goes first."""

_INTERNAL_PRIORITY = 2**31
"""Above every request's."""
_INTERNAL = "\0"
"""The engine's own sequences are of no task."""
_WAITING_PER_FREE_PLACE = 8
"""A task may have this many waiting for each place left free: one alone gets eight ninths of the queue, two alike eight
seventeenths. Source: Choudhury and Hahne 1998, Dynamic Queue Length Thresholds for Shared-Memory Packet Switches.
"""


@dataclass(slots=True)
class Waiting:
    """How much waits: requests, and tokens of their prompts."""

    num_requests: int = 0
    num_tokens: int = 0

    def add(self, sequence: Sequence, sign: int) -> None:
        """Count a sequence, or with -1 no longer."""
        self.num_requests += sign
        self.num_tokens += sign * sequence.num_tokens


class Queue:
    """Ranks every sequence from ``add`` to ``forget``, and holds those that wait, the next one first.

    Args:
        config: limits.
        clock: monotonic seconds.

    Attributes:
        counted: those that wait and count towards ``max_waiting`` and ``max_waiting_tokens``.
        num_short: those that wait and are not bulk (``Step``).
        limits: of tasks, on what runs at a time and how much.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._ranks: dict[Sequence, Rank] = {}
        self._waiting: dict[str, list[Sequence]] = {}  # by task; each sorted by _waiting_rank, and none empty
        self._shares = Shares()
        self._num_added = 0
        self._num_waiting = 0
        self._counted_of: dict[str, Waiting] = {}
        self.counted = Waiting()
        self.num_short = 0
        self.limits = TaskLimits(clock)

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Those that wait and that their tasks' limits allow, in the order in which they are to start.

        Each one given counts as if its prompt had been served, so that tasks take turns. It may leave; otherwise the
        queue must not change meanwhile.
        """
        heads: list[tuple[int, bool, float, float, int, Sequence, Iterator[Sequence]]] = []
        served: dict[str, float] = {}

        def push(task: str, rest: Iterator[Sequence]) -> None:
            sequence = next(rest, None)
            if sequence is not None:
                priority, begins, arrival, order = self._waiting_rank(sequence)
                counter = served[task] if begins else 0.0
                heapq.heappush(heads, (priority, begins, counter, arrival, order, sequence, rest))

        for task, waiting in self._waiting.items():
            served[task] = self._shares.counter(task)
            push(task, iter(tuple(waiting)))
        while heads:
            *_, sequence, rest = heapq.heappop(heads)
            task = _task(sequence)
            if sequence.is_internal or self.limits.allow(sequence):
                yield sequence
                served[task] += PROMPT_COST * sequence.num_left / sequence.entitlement.share
            push(task, rest)

    def waiting(self) -> tuple[Sequence, ...]:
        """All that wait, in no order, whatever state they are in."""
        return tuple(sequence for waiting in self._waiting.values() for sequence in waiting)

    def rank(self, sequence: Sequence) -> Rank:
        """The sequence's place among all that run."""
        return self._ranks[sequence]

    def has_place(self, task: str, num_elsewhere: int) -> bool:
        """Whether one more of a task may wait, as far as their number goes; callable from any thread."""
        num_free = self._config.max_waiting - self.counted.num_requests - num_elsewhere
        return num_free > 0 and self._of(task).num_requests < _WAITING_PER_FREE_PLACE * num_free

    def has_room(self, task: str, num_tokens: int) -> bool:
        """Whether so many tokens of a task may wait; a prompt alone may, however long it is."""
        num_waiting = self.counted.num_tokens
        num_free = self._config.max_waiting_tokens - num_waiting
        return num_waiting == 0 or (
            num_tokens <= num_free and self._of(task).num_tokens < _WAITING_PER_FREE_PLACE * num_free
        )

    def add(self, sequence: Sequence) -> None:
        """Rank a new sequence after its equals; it waits."""
        priority = _INTERNAL_PRIORITY if sequence.is_internal else sequence.priority
        self._ranks[sequence] = (-priority, sequence.arrival, self._num_added)
        self._num_added += 1
        self.enter(sequence)

    def enter(self, sequence: Sequence) -> None:
        """Note that a sequence is waiting, for the first time or again."""
        sequence.status = SequenceStatus.WAITING
        task = _task(sequence)
        waiting = self._waiting.get(task)
        if waiting is None:
            if not sequence.is_internal:
                self._shares.begin_waiting(task, (each for each in self._waiting if each != _INTERNAL))
            waiting = self._waiting[task] = []
        insort(waiting, sequence, key=self._waiting_rank)
        self._count(sequence, +1)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence no longer waits; it keeps its rank."""
        task = _task(sequence)
        waiting = self._waiting[task]
        del waiting[bisect_left(waiting, self._waiting_rank(sequence), key=self._waiting_rank)]
        if not waiting:
            del self._waiting[task]
            if not sequence.is_internal:
                self._shares.end_waiting(task)
        self._count(sequence, -1)

    def charge(self, sequence: Sequence, start: int, end: int) -> None:
        """Count tokens [start, end) of a sequence, which have been computed, for its task."""
        if not sequence.is_internal:
            self.limits.spend(sequence, max(0, end - max(start, sequence.num_charged)))
            self._shares.charge(sequence, start, end)

    def forget(self, sequence: Sequence) -> None:
        """Drop the rank of a sequence that has finished, and does not wait. Safe to repeat."""
        self._ranks.pop(sequence, None)

    def clear(self) -> None:
        """Forget all of them, but not what tasks were served."""
        self._ranks.clear()
        self._waiting.clear()
        self._counted_of.clear()
        self.counted = Waiting()
        self._num_waiting = self.num_short = 0
        self.limits.clear()

    def _count(self, sequence: Sequence, change: int) -> None:
        self._num_waiting += change
        self.num_short += change * (not self._config.is_bulk(sequence, sequence.num_tokens))
        if not sequence.is_counted:
            return
        self.counted.add(sequence, change)
        of_task = self._counted_of.setdefault(sequence.task, Waiting())
        of_task.add(sequence, change)
        if not of_task.num_requests:
            del self._counted_of[sequence.task]

    def _of(self, task: str) -> Waiting:
        return self._counted_of.get(task) or Waiting()

    def _waiting_rank(self, sequence: Sequence) -> tuple[int, bool, float, int]:
        priority, arrival, order = self._ranks[sequence]
        return (priority, sequence.num_preemptions == 0, arrival, order)


def _task(sequence: Sequence) -> str:
    return _INTERNAL if sequence.is_internal else sequence.task
