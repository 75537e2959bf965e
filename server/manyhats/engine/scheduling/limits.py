"""Limits of a task: sequences at a time, tokens a second, and how many of the seats it may take.

The last seats are for tasks that come later: while nobody else waits, a task that runs more than eight sequences for
each seat left free begins no other. So what a quiet task asks finds a seat at once beside a greedy one. Where two wait,
all seats go by turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from manyhats.engine.scheduling.sequence import Sequence

_BURST_S = 1.0
"""A task that has been idle may be served this many seconds' tokens at once."""
_RUNNING_PER_FREE_SEAT = 8
"""A task that waits alone and runs more than this for each seat left free begins no other: it gets eight ninths."""


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
        self._num_running: dict[str, int] = {}
        self._allowances: dict[str, _Allowance] = {}

    def held_until_s(self, sequence: Sequence, *, leaves_seats: bool = False) -> float:
        """Until when its task's limits hold back a waiting sequence.

        Args:
            sequence: waits.
            leaves_seats: whether its task is to leave some to others.

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
        num_free = max(0, self._num_seats - self._num_seated)
        if leaves_seats and num_running > _RUNNING_PER_FREE_SEAT * num_free:
            return math.inf
        rate = sequence.entitlement.max_tokens_per_second
        if rate is None or (tokens := self._allowance(sequence.task, rate).tokens) > 0:
            return -math.inf
        return self._clock() - tokens / rate

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
        """Note that nothing runs."""
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
