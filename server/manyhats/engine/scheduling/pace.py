"""How fast prompts have been read lately, and so which deadlines cannot be met."""

from __future__ import annotations

from collections.abc import Callable

_DECAY = 0.998
"""A step: after 350 steps the best pace counts half, so that it follows a machine that gets slower."""


class Pace:
    """Measures steps. What it says of a deadline is optimistic: at the best pace that was seen lately.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = 0.0
        self._tokens_per_s = 0.0  # 0 until a step has run

    def begin(self) -> None:
        """Note that a step begins."""
        self._began_s = self._clock()

    def end(self, num_tokens: int) -> float:
        """Note that it has run so many tokens; the seconds that it took."""
        elapsed_s = self._clock() - self._began_s
        if elapsed_s > 0:
            self._tokens_per_s = max(self._tokens_per_s * _DECAY, num_tokens / elapsed_s)
        return elapsed_s

    def can_meet(self, deadline_s: float | None, num_tokens: int) -> bool:
        """Whether so many tokens of a prompt may be computed by a deadline, as far as is known."""
        if deadline_s is None or self._tokens_per_s == 0:
            return True
        return self._clock() + num_tokens / self._tokens_per_s <= deadline_s
