"""The tasks that wait, in the order of their turns, kept so that a step looks at few of them."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

Place = tuple[int, bool, float, float, int]
"""(-priority, whether it begins, its task's counter, arrival, order of adding); smaller goes first."""


class Turns:
    """Tasks by their places.

    A place that is known may be earlier than the true one, which moves back by itself as a task is served and its
    sequences start; whoever comes to it puts that right with ``moved``. It is never later: ``moved`` says so at once.

    Args:
        place: of the next sequence of a task; None if none waits.
        clock: monotonic seconds.
    """

    def __init__(self, place: Callable[[str], Place | None], clock: Callable[[], float]) -> None:
        self._place = place
        self._clock = clock
        self._known: dict[str, Place] = {}
        self._order: list[tuple[Place, str]] = []  # sorted
        self._moved: set[str] = set()
        self._held: dict[str, float] = {}  # by time
        self._waiting_for_others: set[str] = set()  # held without one
        self._releases: list[
            tuple[float, str]
        ] = []  # a heap; some are of tasks that have been released otherwise

    def __iter__(self) -> Iterator[tuple[Place, str]]:
        """Known places, the first first, without the tasks that are held back. Ends at the next ``iter``."""
        now_s = self._clock()
        while self._releases and self._releases[0][0] <= now_s:
            until_s, task = heapq.heappop(self._releases)
            if self._held.get(task) == until_s:
                self.moved(task)
        for task in self._moved:
            self._sort(task)
        self._moved.clear()
        return iter(self._order)

    def moved(self, task: str) -> None:
        """Note that a task's place may be another, and that it is not held back, as far as is known."""
        self._held.pop(task, None)
        self._waiting_for_others.discard(task)
        self._moved.add(task)

    def hold(self, task: str, until_s: float) -> None:
        """Leave a task out until then, or until it has moved; if that is never, until ``release``."""
        self._moved.add(task)
        if until_s < math.inf:
            self._held[task] = until_s
            heapq.heappush(self._releases, (until_s, task))
        else:
            self._waiting_for_others.add(task)

    def release(self) -> None:
        """Leave out none any longer that wait for others to stop; they are few, since each of these tasks runs some."""
        for task in tuple(self._waiting_for_others):
            self.moved(task)

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()
        self._order.clear()
        self._moved.clear()
        self._held.clear()
        self._waiting_for_others.clear()
        self._releases.clear()

    def _sort(self, task: str) -> None:
        known = self._known.pop(task, None)
        if known is not None:
            del self._order[bisect_left(self._order, (known, task))]
        is_held = task in self._held or task in self._waiting_for_others
        place = None if is_held else self._place(task)
        if place is not None:
            self._known[task] = place
            insort(self._order, (place, task))
