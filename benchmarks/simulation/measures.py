"""What a simulation shows: how long first tokens took, by how popular a task is, and whether shares were kept."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.simulation.replica import Call, Watch
from manyhats.engine.scheduling.schedule import Schedule
from manyhats.engine.scheduling.sequence import Sequence as Waiting
from manyhats.engine.scheduling.shares import OUTPUT_COST, PROMPT_COST
from manyhats.load.report import percentile


class UnfairError(Exception):
    """Shares went further apart than the scheduler's bound."""


class Answers(Watch):
    """Times to first tokens and ends.

    Args:
        ranks: of the tasks, the most popular 0.
        bands: the last rank of each band, and one more.

    Attributes:
        outcomes: how many calls ended how.
        num_tokens: of all that were answered.
    """

    def __init__(self, ranks: Mapping[str, int], bands: Sequence[int]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.num_tokens = 0
        self._ranks = ranks
        self._bands = bands
        self._first_s = [array("d") for _ in bands]

    def ended(self, call: Call) -> None:
        self.outcomes[call.outcome] += 1
        if call.first_s >= 0:
            band = bisect_left(self._bands, self._ranks[call.arrival.task] + 1)
            self._first_s[band].append(call.first_s - call.came_s)
            self.num_tokens += call.sequence.num_output_tokens if call.sequence is not None else 0

    def first_ms(self, percents: Iterable[int] = (50, 95, 99)) -> list[tuple[int, list[float]]]:
        """Of each band, how many were answered and the percentiles, in milliseconds; none of nothing."""
        found = []
        for values in self._first_s:
            ordered = sorted(values)
            found.append(
                (len(ordered), [1000 * percentile(ordered, each) for each in percents] if ordered else [])
            )
        return found


class Shares(Watch):
    """Checks that of two tasks that wait all the time, neither is served more than the bound allows.

    In windows of some steps: what two tasks were served over their shares, in a window through which both waited,
    differs at most by what the running sequences of each and one more cost (``scheduling/shares.py``), once for where
    the window begins and once for where it ends.

    Args:
        largest: what a sequence costs at most.
        num_steps: of a window.

    Attributes:
        num_waited, num_served: how often a task waited through a window, and how often it was served meanwhile.
        widest: the largest difference, as a part of its bound.
    """

    def __init__(self, largest: float, num_steps: int) -> None:
        self.num_waited = self.num_served = 0
        self.widest = 0.0
        self._largest = largest
        self._window = num_steps
        self._num_steps = 0
        self._waiting: Counter[str] = Counter()
        self._running: dict[Waiting, None] = {}
        self._served: defaultdict[str, float] = defaultdict(float)  # by what no longer runs
        self._running_cost: defaultdict[str, float] = defaultdict(float)
        self._most_running_cost: defaultdict[str, float] = defaultdict(float)
        self._throughout: dict[
            str, float
        ] = {}  # waiting since the window began, and what it had been served then

    def queued(self, sequence: Waiting) -> None:
        self._waiting[sequence.task] += 1

    def stepped(self, schedule: Schedule) -> None:
        for sequence in schedule.started:
            task = sequence.task
            self._running[sequence] = None
            self._running_cost[task] += _whole_cost(sequence)
            self._most_running_cost[task] = max(self._most_running_cost[task], self._running_cost[task])
            self._stops_waiting(task)
        for sequence in schedule.preempted:
            self._stops(sequence)
            self._waiting[sequence.task] += 1
        self._num_steps += 1
        if self._num_steps % self._window == 0:
            self._check()

    def ended(self, call: Call) -> None:
        sequence = call.sequence
        if sequence is None:
            return
        if sequence in self._running:
            self._stops(sequence)
        else:
            self._stops_waiting(sequence.task)

    def _stops(self, sequence: Waiting) -> None:
        del self._running[sequence]
        self._served[sequence.task] += _cost(sequence)
        self._running_cost[sequence.task] -= _whole_cost(sequence)

    def _stops_waiting(self, task: str) -> None:
        self._waiting[task] -= 1
        if not self._waiting[task]:
            del self._waiting[task]
            self._throughout.pop(task, None)

    def _check(self) -> None:
        served = self._served.copy()
        for sequence in self._running:
            served[sequence.task] += _cost(sequence)
        gained = {task: served[task] - before for task, before in self._throughout.items()}
        if gained:
            least, most = min(gained, key=gained.__getitem__), max(gained, key=gained.__getitem__)
            bound = 2 * sum(self._most_running_cost[task] + self._largest for task in (least, most))
            self.widest = max(self.widest, (gained[most] - gained[least]) / bound)
            self.num_waited += len(gained)
            self.num_served += sum(each > 0 for each in gained.values())
            if self.widest > 1:
                raise UnfairError(
                    f"{most} was served {gained[most]:.0f} and {least} {gained[least]:.0f} tokens over their "
                    f"shares while both waited; they may differ by {bound:.0f}"
                )
        self._throughout = {task: served[task] for task in self._waiting}


def _cost(sequence: Waiting) -> float:
    """What was charged for a sequence so far, over its task's share."""
    num_prompt = min(sequence.num_charged, sequence.num_prompt_tokens)
    num_output = sequence.num_charged - num_prompt
    return (num_prompt * PROMPT_COST + num_output * OUTPUT_COST) / sequence.entitlement.share


def _whole_cost(sequence: Waiting) -> float:
    num_output = sequence.max_num_tokens - sequence.num_prompt_tokens
    return (sequence.num_prompt_tokens * PROMPT_COST + num_output * OUTPUT_COST) / sequence.entitlement.share
