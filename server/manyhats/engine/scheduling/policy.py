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
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from manyhats.engine.scheduling.limits import TaskLimits
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.shares import PROMPT_COST, Shares
from manyhats.engine.scheduling.turns import Place, Turns

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


@dataclass(slots=True, eq=False)
class _Line:
    """The sequences of one task that wait, at least one, sorted by ``Queue._waiting_rank``."""

    share: float
    sequences: list[Sequence] = field(default_factory=list)
    counted: Waiting = field(default_factory=Waiting)
    num_continuations: int = 0


class Queue:
    """Ranks every sequence from ``add`` to ``forget``, and holds those that wait, the next one first.

    Args:
        config: limits.
        clock: monotonic seconds.

    Attributes:
        counted: those that wait and count towards ``max_waiting`` and ``max_waiting_tokens``.
        waiting_since_s: since when some of them have; infinite if none does.
        num_short: those that wait and are not bulk (``Step``).
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._ranks: dict[Sequence, Rank] = {}
        self._lines: dict[str, _Line] = {}  # by task
        self._shares = Shares()
        self._turns = Turns(self._first_place, clock)
        self._limits = TaskLimits(config.max_num_sequences, clock)
        self._num_added = 0
        self._num_waiting = 0
        self._total_share = 0.0  # of tasks that wait
        self._clock = clock
        self.counted = Waiting()
        self.waiting_since_s = math.inf
        self.num_short = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Those that wait and that their tasks' limits allow, in the order in which they are to start.

        Each one given counts as if its prompt had been served, so that tasks take turns. It may leave; otherwise the
        queue must not change meanwhile. What it takes grows with how many are given, and hardly with how many wait.
        """
        given: dict[str, float] = {}  # what those of a task add to its counter
        # A heap: the next sequence of each task that has been come to.
        looked_at: list[tuple[Place, str, int]] = []

        def push(task: str, index: int) -> Place | None:
            line = self._lines.get(task)
            if line is None or index >= len(line.sequences):
                return None
            place = self._place(task, line.sequences[index], given.get(task, 0.0))
            heapq.heappush(looked_at, (place, task, index))
            return place

        turns = iter(self._turns)
        turn = next(turns, None)
        while turn is not None or looked_at:
            if turn is not None and (not looked_at or turn < looked_at[0][:2]):
                known, task = turn
                if push(task, 0) != known:
                    self._turns.moved(task)
                turn = next(turns, None)
                continue
            _, task, index = heapq.heappop(looked_at)
            line = self._lines[task]
            sequence = line.sequences[index]
            until_s = self._limits.held_until_s(sequence, may_come=self._shares.num_tasks > 1)
            if until_s == -math.inf:
                yield sequence
                cost = PROMPT_COST * sequence.num_left / sequence.entitlement.share
                given[task] = given.get(task, 0.0) + cost
                index += sequence.status is SequenceStatus.WAITING
            elif not line.num_continuations:
                self._turns.hold(task, until_s)
                continue
            else:
                index += 1
            push(task, index)

    def waiting(self) -> tuple[Sequence, ...]:
        """All that wait, in no order, whatever state they are in."""
        return tuple(sequence for line in self._lines.values() for sequence in line.sequences)

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

    def num_ahead(self, task: str) -> int:
        """About how many that wait now begin before one more of a task; callable from any thread.

        Those of its own, and in the same time of each other task as many as their shares allow.
        """
        line = self._lines.get(task)
        num_own, share = (0, 1.0) if line is None else (line.counted.num_requests, line.share)
        return min(self.counted.num_requests, math.ceil((num_own + 1) * self._total_share / share))

    def add(self, sequence: Sequence) -> None:
        """Rank a new sequence after its equals; it waits."""
        priority = _INTERNAL_PRIORITY if sequence.is_internal else sequence.priority
        self._ranks[sequence] = (-priority, sequence.arrival, self._num_added)
        self._num_added += 1
        self._limits.added(sequence)
        self.enter(sequence)

    def enter(self, sequence: Sequence) -> None:
        """Note that a sequence is waiting, for the first time or again."""
        sequence.status = SequenceStatus.WAITING
        task = _task(sequence)
        line = self._lines.get(task)
        if line is None:
            if not sequence.is_internal:
                self._shares.begin_waiting(task)
                self._turns.release()  # one that was there alone is so no longer
            line = self._lines[task] = _Line(sequence.entitlement.share)
            self._total_share += line.share
        insort(line.sequences, sequence, key=self._waiting_rank)
        self._turns.moved(task)
        self._count(sequence, line, +1)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence no longer waits; it keeps its rank."""
        task = _task(sequence)
        line = self._lines[task]
        at = bisect_left(line.sequences, self._waiting_rank(sequence), key=self._waiting_rank)
        del line.sequences[at]
        if not line.sequences:
            del self._lines[task]
            self._total_share -= line.share
            self._turns.moved(task)
            if not sequence.is_internal:
                self._shares.end_waiting(task)
        self._count(sequence, line, -1)

    def started(self, sequence: Sequence) -> None:
        """Note that a sequence runs."""
        self._limits.started(sequence)

    def stopped(self, sequence: Sequence) -> None:
        """Note that it no longer does."""
        self._limits.stopped(sequence)
        self._turns.release()

    def exceeds_share(self, sequence: Sequence) -> bool:
        """Whether a sequence's task runs on more than its share of all seats, of which others have used some lately."""
        return self._limits.exceeds_share(sequence, may_come=self._shares.num_tasks > 1)

    def charge(self, sequence: Sequence, start: int, end: int) -> None:
        """Count tokens [start, end) of a sequence, which have been computed, for its task."""
        if not sequence.is_internal:
            self._limits.spend(sequence, max(0, end - max(start, sequence.num_charged)))
            self._shares.charge(sequence, start, end)

    def forget(self, sequence: Sequence) -> None:
        """Drop the rank of a sequence that has finished, and does not wait. Safe to repeat."""
        if self._ranks.pop(sequence, None) is not None:
            self._limits.forgotten(sequence)

    def clear(self) -> None:
        """Forget all of them, but not what tasks were served."""
        for task in self._lines.keys() - {_INTERNAL}:
            self._shares.end_waiting(task)
        self._ranks.clear()
        self._lines.clear()
        self._turns.clear()
        self._limits.clear()
        self._num_waiting = self.num_short = 0
        self._total_share = 0.0
        self.counted = Waiting()
        self.waiting_since_s = math.inf

    def _count(self, sequence: Sequence, line: _Line, change: int) -> None:
        self._num_waiting += change
        self.num_short += change * (not self._config.is_bulk(sequence, sequence.num_tokens))
        line.num_continuations += change * sequence.is_continuation
        if sequence.is_counted:
            self.counted.add(sequence, change)
            line.counted.add(sequence, change)
            if not self.counted.num_requests:
                self.waiting_since_s = math.inf
            elif self.waiting_since_s == math.inf:
                self.waiting_since_s = self._clock()

    def _of(self, task: str) -> Waiting:
        line = self._lines.get(task)
        return Waiting() if line is None else line.counted

    def _first_place(self, task: str) -> Place | None:
        line = self._lines.get(task)
        return None if line is None else self._place(task, line.sequences[0], 0.0)

    def _place(self, task: str, sequence: Sequence, given: float) -> Place:
        priority, begins, arrival, order = self._waiting_rank(sequence)
        return (priority, begins, self._shares.counter(task) + given if begins else 0.0, arrival, order)

    def _waiting_rank(self, sequence: Sequence) -> tuple[int, bool, float, int]:
        priority, arrival, order = self._ranks[sequence]
        return (priority, sequence.num_preemptions == 0, arrival, order)


def _task(sequence: Sequence) -> str:
    return _INTERNAL if sequence.is_internal else sequence.task
