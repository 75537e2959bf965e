"""How many tokens a sequence drafts in a step, judged by what became of its drafts so far."""

from __future__ import annotations

_FEW = 3
"""With the token itself these are four rows, which a step computes in hardly more time than one."""
_PATIENCE = 2
_LONGEST_PAUSE = 16


class Pace:
    """A few at a time; the most that is allowed after drafts that all came.

    Each time that several drafts in a row were of no use, it pauses, twice as long as before: a sequence that repeats
    nothing then seldom drafts. One token that came makes it forget that.

    Args:
        max_tokens: the most that is allowed.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._has_all_come = False
        self._num_useless = 0  # in a row
        self._pause = 1  # the next one, in steps
        self._num_paused = 0  # steps that are left of it

    def next(self) -> int:
        """How many to draft in the step that begins now."""
        if self._num_paused:
            self._num_paused -= 1
            return 0
        return self._max_tokens if self._has_all_come else min(_FEW, self._max_tokens)

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """Take notice of a step's drafts, at least one, and of how many came."""
        self._has_all_come = num_accepted == num_drafted
        if num_accepted:
            self._num_useless, self._pause = 0, 1
            return
        self._num_useless += 1
        if self._num_useless >= _PATIENCE:
            self._num_paused = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
