"""Simulated time: what happens next, and when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Events:
    """What is yet to happen; of what happens at one time, the first added is first.

    Attributes:
        now_s: the simulated clock, from 0.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def clock(self) -> float:
        """``now_s``, where a function is wanted."""
        return self.now_s

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Have something happen in so many seconds."""
        heapq.heappush(self._heap, (self.now_s + seconds, next(self._numbers), happen))

    def run(self) -> None:
        """Let everything happen, until nothing is left to."""
        while self._heap:
            self.now_s, _, happen = heapq.heappop(self._heap)
            happen()
