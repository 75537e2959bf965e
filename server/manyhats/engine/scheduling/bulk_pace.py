"""How many bulk tokens a step may have beside decodes, from how long such steps take.

What a token of a long prompt costs grows with its position, as attention does: behind 4,096 tokens of context a row of
a small model costs several times what it does at the beginning. A fixed number of tokens would let gaps grow with it.
"""

from __future__ import annotations

_GROWTH = 2.5
"""Bulk tokens may make a step so many times as long as its decodes alone. The aim for the largest gap is 3."""
_SHORT_S = 0.002
"""Nobody notices gaps of this length, whatever they were without bulk tokens."""
_WEIGHT = 0.1
"""Of the latest step, against those before: what else the machine does lengthens some."""
_MOST_AT_ONCE = 4.0
"""One step counts as this many times what was expected at most."""


class BulkPace:
    """Learns from steps that have nothing but decodes and bulk tokens."""

    def __init__(self) -> None:
        self._alone_s: dict[int, float] = {}  # number of decodes → a step of these alone
        self._token_s: float | None = None

    def limit(self, num_decodes: int) -> int | None:
        """How many bulk tokens a step may have beside so many decodes, at least one; None while that is not known."""
        if not num_decodes or not self._token_s or not self._alone_s:
            return None
        alone_s = self._alone(num_decodes)
        return None if alone_s < _SHORT_S else max(1, int((_GROWTH - 1) * alone_s / self._token_s))

    def note(self, num_decodes: int, num_bulk: int, seconds: float) -> None:
        """Note what a step of so many decodes, and of bulk tokens, has taken."""
        if not num_decodes:
            return
        if not num_bulk:
            self._alone_s[num_decodes] = _mean(self._alone_s.get(num_decodes), seconds)
        elif self._alone_s:
            token_s = max(0.0, seconds - self._alone(num_decodes)) / num_bulk
            self._token_s = _mean(self._token_s, token_s)

    def _alone(self, num_decodes: int) -> float:
        """A step of so many decodes, or of the number nearest to it that is known."""
        known = min(self._alone_s, key=lambda number: abs(number - num_decodes))
        return self._alone_s[known]


def _mean(before: float | None, latest: float) -> float:
    if not before:
        return latest
    return before + _WEIGHT * (min(latest, _MOST_AT_ONCE * before) - before)
