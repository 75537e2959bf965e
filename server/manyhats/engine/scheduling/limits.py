"""Limits of a task, whatever else there is to do: sequences at a time, and tokens a second."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from manyhats.engine.scheduling.sequence import Sequence

_BURST_S = 1.0
"""A task that has been idle may be served this many seconds' tokens at once."""


@dataclass(slots=True)
class _Allowance:
    """A bucket of tokens, full at the rate's tokens of ``_BURST_S``; may be overdrawn, and is then paid back."""

    tokens: float
    updated_s: float


class TaskLimits:
    """Says which waiting sequences their tasks' limits hold back. Running ones are never slowed.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_running: dict[str, int] = {}
        self._allowances: dict[str, _Allowance] = {}

    def held_until_s(self, sequence: Sequence) -> float:
        """Until when its task's limits hold back a waiting sequence.

        Returns:
            On the clock; infinite until another of the task stops; −∞ if nothing does, as with what belongs to a
            sequence that has begun.
        """
        if sequence.is_continuation or sequence.is_internal:
            return -math.inf
        most = sequence.entitlement.max_concurrency
        if most is not None and self._num_running.get(sequence.task, 0) >= most:
            return math.inf
        rate = sequence.entitlement.max_tokens_per_second
        if rate is None or (tokens := self._allowance(sequence.task, rate).tokens) > 0:
            return -math.inf
        return self._clock() - tokens / rate

    def started(self, sequence: Sequence) -> None:
        """Note that a sequence runs."""
        if not sequence.is_internal:
            self._num_running[sequence.task] = self._num_running.get(sequence.task, 0) + 1

    def stopped(self, sequence: Sequence) -> None:
        """Note that it no longer does."""
        if not sequence.is_internal:
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

    def _allowance(self, task: str, rate: float) -> _Allowance:
        now_s, full = self._clock(), rate * _BURST_S
        allowance = self._allowances.get(task)
        if allowance is None:
            allowance = self._allowances[task] = _Allowance(full, now_s)
        allowance.tokens = min(full, allowance.tokens + (now_s - allowance.updated_s) * rate)
        allowance.updated_s = now_s
        return allowance
