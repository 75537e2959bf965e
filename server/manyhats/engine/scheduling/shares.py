"""What tasks have been served, and whose turn that makes it: weighted fair queueing by tokens.

Each task has a counter: the tokens that it was served, generated ones twice, over its share. The task that waits with
the smallest counter is next. One that begins to wait is lifted to the smallest of those that do, or, if none does, to
that of the task that was the last to: what it has not used in the meantime is not saved up, nor is what it was served
alone held against it.

Of two tasks that both wait all the time, what one was served over its share exceeds the other's by at most what its
running sequences and one more cost: each was begun when it was the task's turn, and goes on to its end.
Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (OSDI; arXiv:2401.00588), with shares.
"""

from __future__ import annotations

import heapq

from manyhats.engine.scheduling.sequence import Sequence

PROMPT_COST = 1.0
"""Of a token of a prompt."""
OUTPUT_COST = 2.0
"""Of a generated token: it takes a step, in which a prompt would have got many tokens."""

_MIN_KEPT = 256


class Shares:
    """The counters of all tasks that have waited or run lately."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: set[str] = set()
        # A task once, by what its counter was when last looked at: they only grow, so the smallest is soon at the top.
        self._by_counter: list[tuple[float, str]] = []
        self._in_order: set[str] = set()
        self._floor = 0.0  # the smallest counter of those that wait, or did last
        self._last_waiting = ""
        self._num_kept = 0  # after the last time that some were dropped

    @property
    def num_tasks(self) -> int:
        """How many have waited or run lately."""
        return len(self._counters)

    def counter(self, task: str) -> float:
        """Tokens over share; of a task that is not known, what it would be lifted to."""
        return self._counters.get(task, self._floor)

    def begin_waiting(self, task: str) -> None:
        """Lift the counter of a task that begins to wait, beside those that do already."""
        self._floor = max(self._floor, self._lowest())
        counter = self._counters[task] = max(self.counter(task), self._floor)
        self._waiting.add(task)
        if task not in self._in_order:
            self._in_order.add(task)
            heapq.heappush(self._by_counter, (counter, task))
        self._drop_low()

    def end_waiting(self, task: str) -> None:
        """Note that none of a task's sequences waits any more."""
        self._waiting.discard(task)
        self._last_waiting = task

    def charge(self, sequence: Sequence, start: int, end: int) -> None:
        """Count tokens [start, end) of a sequence, once each, however often they are computed."""
        first = max(start, sequence.num_charged)
        if end <= first:
            return
        sequence.num_charged = end
        num_prompt = max(0, min(end, sequence.num_prompt_tokens) - first)
        cost = num_prompt * PROMPT_COST + (end - first - num_prompt) * OUTPUT_COST
        self._counters[sequence.task] = self.counter(sequence.task) + cost / sequence.entitlement.share

    def _lowest(self) -> float:
        """The smallest counter of the tasks that wait; if none does, that of the last to."""
        while self._by_counter:
            known, task = self._by_counter[0]
            counter = self.counter(task)
            if task not in self._waiting:
                heapq.heappop(self._by_counter)
                self._in_order.discard(task)
            elif counter > known:
                heapq.heapreplace(self._by_counter, (counter, task))
            else:
                return counter
        return self.counter(self._last_waiting)

    def _drop_low(self) -> None:
        """Forget counters that would be lifted anyway, so that they stay few; each is looked at seldom."""
        if len(self._counters) > 2 * max(self._num_kept, _MIN_KEPT):
            kept = {task: counter for task, counter in self._counters.items() if counter > self._floor}
            self._counters, self._num_kept = kept, len(kept)
