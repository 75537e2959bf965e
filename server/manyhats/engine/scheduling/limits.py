"""Limits of a task: sequences at a time, tokens a second, and how many of the seats it may take.

The last seats are for tasks that come later: a task that runs more than eight sequences for each seat left free, and
more than its share of the seats, begins no other. So what a quiet task asks finds a seat at once beside a greedy one.
While nobody else is there, its share is all seats, unless others have been there lately.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from manyhats.engine.scheduling.sequence import Sequence

_BURST_S = 1.0
"""A task that has been idle may be served this many seconds' tokens at once."""
_RUNNING_PER_FREE_SEAT = 8
"""A task that runs more than this for each seat left free begins no other: one alone gets eight ninths of them."""


@dataclass(slots=True)
class _Allowance:
    """A bucket of tokens, full at the rate's tokens of ``_BURST_S``; may be overdrawn, and is then paid back."""

    tokens: float
    updated_s: float


class TaskLimits:
    """Says which waiting sequences their tasks' limits hold back. Running ones are never slowed.

    Args:
        num_seats: sequences that run at a time, of all tasks.
        clock: monotonic seconds.
    """

    def __init__(self, num_seats: int, clock: Callable[[], float]) -> None:
        self._num_seats = num_seats
        self._clock = clock
        self._num_seated = 0
        # Of tasks with unfinished sequences: how many these are, and the share.
        self._shares: dict[str, tuple[int, float]] = {}
        self._all_shares = 0.0
        self._num_running: dict[str, int] = {}
        self._allowances: dict[str, _Allowance] = {}

    def added(self, sequence: Sequence) -> None:
        """Note that a sequence is there until it is ``forgotten``."""
        if not sequence.is_internal:
            count, share = self._shares.get(sequence.task, (0, 0.0))
            self._shares[sequence.task] = (count + 1, sequence.entitlement.share)
            self._all_shares += sequence.entitlement.share - share

    def forgotten(self, sequence: Sequence) -> None:
        """Note that it no longer is."""
        if not sequence.is_internal:
            count, share = self._shares.pop(sequence.task)
            if count > 1:
                self._shares[sequence.task] = (count - 1, share)
            else:
                self._all_shares = self._all_shares - share if self._shares else 0.0

    def held_until_s(self, sequence: Sequence, *, may_come: bool = False) -> float:
        """Until when its task's limits hold back a waiting sequence.

        Args:
            sequence: waits.
            may_come: whether other tasks have been there lately.

        Returns:
            On the clock; infinite until another of the task stops; −∞ if nothing does, as with what belongs to a
            sequence that has begun.
        """
        if sequence.is_continuation or sequence.is_internal:
            return -math.inf
        num_running = self._num_running.get(sequence.task, 0)
        most = sequence.entitlement.max_concurrency
        if most is not None and num_running >= most:
            return math.inf
        if self._leaves_seats(sequence, num_running, may_come=may_come):
            return math.inf
        rate = sequence.entitlement.max_tokens_per_second
        if rate is None or (tokens := self._allowance(sequence.task, rate).tokens) > 0:
            return -math.inf
        return self._clock() - tokens / rate

    def _leaves_seats(self, sequence: Sequence, num_running: int, *, may_come: bool) -> bool:
        num_free = max(0, self._num_seats - self._num_seated)
        if num_running <= _RUNNING_PER_FREE_SEAT * num_free:
            return False
        return may_come if len(self._shares) == 1 else self.exceeds_share(sequence, may_come=may_come)

    def exceeds_share(self, sequence: Sequence, *, may_come: bool) -> bool:
        """Whether its task runs on more than its share of all seats, beside others.

        Where it is alone, and others ``may_come``, its share is half of them.
        """
        num_running = 0 if sequence.is_internal else self._num_running.get(sequence.task, 0)
        if len(self._shares) == 1:
            return may_come and 2 * num_running > self._num_seats
        return num_running * self._all_shares > self._num_seats * sequence.entitlement.share

    def started(self, sequence: Sequence) -> None:
        """Note that a sequence runs."""
        if not sequence.is_internal:
            self._num_running[sequence.task] = self._num_running.get(sequence.task, 0) + 1
            self._num_seated += 1

    def stopped(self, sequence: Sequence) -> None:
        """Note that it no longer does."""
        if not sequence.is_internal:
            self._num_seated -= 1
            num_left = self._num_running.pop(sequence.task) - 1
            if num_left:
                self._num_running[sequence.task] = num_left

    def spend(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that tokens of a sequence were computed."""
        rate = sequence.entitlement.max_tokens_per_second
        if rate is not None:
            self._allowance(sequence.task, rate).tokens -= num_tokens

    def clear(self) -> None:
        """Note that there is none any more."""
        self._shares.clear()
        self._all_shares = 0.0
        self._num_running.clear()
        self._num_seated = 0

    def _allowance(self, task: str, rate: float) -> _Allowance:
        now_s, full = self._clock(), rate * _BURST_S
        allowance = self._allowances.get(task)
        if allowance is None:
            allowance = self._allowances[task] = _Allowance(full, now_s)
        allowance.tokens = min(full, allowance.tokens + (now_s - allowance.updated_s) * rate)
        allowance.updated_s = now_s
        return allowance
