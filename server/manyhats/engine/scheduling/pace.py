"""How fast prompts have been read and requests answered lately, and so which deadlines cannot be met."""

from __future__ import annotations

import math
from collections.abc import Callable

from manyhats.adapters.finish_rate import FinishRate

_DECAY = 0.998
"""A step: after 350 steps the best pace counts half, so that it follows a machine that gets slower."""
_NEWEST = 0.1
"""What a step counts of the average."""
_SETTLED_S, _SOON_SETTLED_S = 10.0, 2.0
"""Windows of ``FinishRate``: the rate of one in which some waited all the time is what the machine can do.

The short one does where as many have ended meanwhile as run at once."""
_KNOWN_S = 30.0
"""How long that holds when none waits: the longest of those windows."""


class Pace:
    """Measures steps, and how many requests end in a second.

    Not thread-safe, but for ``answer_s``.

    Args:
        clock: monotonic seconds.

    Attributes:
        rate: how many requests' sequences end, those that are given up half-way as well.
        step_s: seconds that steps have taken lately; 0 until one has run.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens_per_s = 0.0  # 0 until a step has run
        self.step_s = 0.0
        self.rate = FinishRate(clock=clock)
        self._answered = FinishRate(clock=clock)
        # Both rates, of when some had last waited long enough, and until when they hold.
        self._saturated = (0.0, 0.0)
        self._known_until_s = -math.inf

    def ran(self, num_tokens: int, elapsed_s: float) -> None:
        """Note that a step has run so many tokens in this time."""
        if elapsed_s > 0:
            self._tokens_per_s = max(self._tokens_per_s * _DECAY, num_tokens / elapsed_s)
            self.step_s += _NEWEST * (elapsed_s - self.step_s) if self.step_s else elapsed_s

    def ended(self, num_running: int, waiting_since_s: float, *, is_answered: bool) -> None:
        """Note that one that ran has ended.

        Args:
            num_running: those that run, this one included.
            waiting_since_s: since when some have always been waiting; infinite if none is.
            is_answered: whether it was not given up before its end.
        """
        self.rate.finished()
        if is_answered:
            self._answered.finished()
        now_s = self._clock()
        waited_s = now_s - waiting_since_s
        are_enough = waited_s >= _SOON_SETTLED_S and self.rate.num_since(waiting_since_s) >= num_running
        if are_enough or waited_s >= _SETTLED_S:
            self._saturated = (self.rate.per_second(), self._answered.per_second())
            self._known_until_s = now_s + _KNOWN_S

    def answer_s(self, num_running: int, num_ahead: int = 0) -> float | None:
        """Seconds until one has ended that starts after ``num_ahead`` others; None if this machine is not known.

        By Little's law, from how many run and end. Those that are given up half-way count towards what runs and not
        towards what is answered, so that they do not make an answer look shorter. It is optimistic, as the best of
        several windows is.
        """
        ended, answered = self._saturated
        if self._clock() > self._known_until_s or answered == 0:
            return None
        return num_ahead / ended + num_running / answered

    def can_meet(self, deadline_s: float | None, num_tokens: int) -> bool:
        """Whether so many tokens of a prompt may be computed by a deadline, at the best pace that was seen lately."""
        if deadline_s is None or self._tokens_per_s == 0:
            return True
        return self._clock() + num_tokens / self._tokens_per_s <= deadline_s
