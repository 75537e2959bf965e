"""How well a load was served: latencies, goodput, failures; all together and task by task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from manyhats.load.run import LEFT, OK, Answer
from manyhats.load.workload import Workload

_PERCENTS = (50, 95, 99, 100)
_REFUSED = "QUEUE_FULL"


@dataclass(frozen=True, slots=True)
class Objective:
    """What an answer must keep to be good (a service-level objective).

    Attributes:
        first_s: seconds to its first piece.
        gap_s: seconds between its pieces, at their 99th percentile.
    """

    first_s: float = 2.0
    gap_s: float = 0.5

    def is_met(self, answer: Answer) -> bool:
        """Whether an answer was good."""
        gaps = sorted(answer.gaps_s)
        return (
            answer.outcome == OK
            and answer.first_s <= self.first_s
            and (not gaps or percentile(gaps, 99) <= self.gap_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of some requests.

    Attributes:
        num_requests, num_ok: those that came, and those that were answered to the end.
        num_good: those that met the objective.
        failures: how many failed, by reason.
        first_ms, gap_ms, whole_ms: percentiles of the time to the first piece, between pieces and to the end, by
            percent; of what was answered, or of what came until a caller left.
        refused_ms: percentiles of the time until it was refused, of what came while too much waited.
        num_tokens: of all answers.
    """

    num_requests: int
    num_ok: int
    num_good: int
    failures: Mapping[str, int]
    first_ms: Mapping[int, float]
    gap_ms: Mapping[int, float]
    whole_ms: Mapping[int, float]
    refused_ms: Mapping[int, float]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Beside:
    """How long first tokens of the other tasks took beside the first task of a greedy load.

    Attributes:
        normal_ms, greedy_ms: the 95th percentile in its two halves.
    """

    normal_ms: float
    greedy_ms: float

    @property
    def ratio(self) -> float:
        """What greed made of it."""
        return self.greedy_ms / self.normal_ms


@dataclass(frozen=True, slots=True)
class Report:
    """Of a load.

    Attributes:
        workload, objective: what was asked, and of what quality.
        seconds: from the beginning to the last end.
        all: all requests.
        tasks: each task's, the most requested first.
        beside: of a greedy load; None of others, or if too little was answered.
    """

    workload: Workload
    objective: Objective
    seconds: float
    all: Summary
    tasks: Mapping[str, Summary]
    beside: Beside | None = None

    @property
    def goodput(self) -> float:
        """Good answers a second."""
        return self.all.num_good / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return self.all.num_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {**asdict(self), "goodput": self.goodput, "tokens_per_s": self.tokens_per_s}


def report(workload: Workload, objective: Objective, answers: Sequence[Answer]) -> Report:
    """What came of a load.

    Raises:
        ValueError: nothing was asked.
    """
    if not answers:
        raise ValueError("no request came: the load is too short for its rate")
    by_task: dict[str, list[Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer)
    ordered = sorted(by_task, key=lambda task: (-len(by_task[task]), task))
    return Report(
        workload,
        objective,
        max(answer.ended_s for answer in answers),
        _summary(answers, objective),
        {task: _summary(by_task[task], objective) for task in ordered},
        _beside(workload, [answer for answer in answers if answer.task != ordered[0]]),
    )


def _beside(workload: Workload, others: Sequence[Answer]) -> Beside | None:
    if workload.popularity != "greedy":
        return None
    half_s = workload.duration_s / 2
    normal, greedy = (
        _percentiles(each.first_s for each in others if each.pieces_s and (each.due_s >= half_s) == is_second)
        for is_second in (False, True)
    )
    return Beside(normal[95], greedy[95]) if normal and greedy else None


def _summary(answers: Sequence[Answer], objective: Objective) -> Summary:
    ok = [answer for answer in answers if answer.outcome == OK]
    begun = [answer for answer in answers if answer.outcome in (OK, LEFT) and answer.pieces_s]
    refused = [answer for answer in answers if answer.outcome == _REFUSED]
    outcomes = Counter(answer.outcome for answer in answers)
    return Summary(
        num_requests=len(answers),
        num_ok=len(ok),
        num_good=sum(objective.is_met(answer) for answer in answers),
        failures={name: outcomes[name] for name in sorted(outcomes.keys() - {OK, LEFT})},
        first_ms=_percentiles(answer.first_s for answer in begun),
        gap_ms=_percentiles(gap for answer in begun for gap in answer.gaps_s),
        whole_ms=_percentiles(answer.ended_s - answer.due_s for answer in ok),
        refused_ms=_percentiles(answer.ended_s - answer.due_s for answer in refused),
        num_tokens=sum(answer.num_tokens for answer in answers),
    )


def _percentiles(seconds: Iterable[float]) -> dict[int, float]:
    """In milliseconds; none of nothing."""
    values = sorted(seconds)
    return {percent: round(1000 * percentile(values, percent), 2) for percent in _PERCENTS} if values else {}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least of ordered values that so many percent do not exceed (the nearest-rank method)."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


COLUMNS = (
    "task",
    "requests",
    "answered",
    "good",
    "first p50",
    "p95",
    "p99",
    "gap p50",
    "p99",
    "max",
    "failed",
)


def rows(found: Report, num_tasks: int) -> list[tuple[str, ...]]:
    """The cells of a table: all requests, then the tasks that were asked most. Times are in milliseconds."""
    shown = list(found.tasks.items())[:num_tasks]
    return [_row("all", found.all), *(_row(task or "(base)", summary) for task, summary in shown)]


def _row(name: str, summary: Summary) -> tuple[str, ...]:
    first, gap = summary.first_ms, summary.gap_ms
    return (
        name,
        str(summary.num_requests),
        str(summary.num_ok),
        str(summary.num_good),
        *(_shown(first.get(percent)) for percent in (50, 95, 99)),
        *(_shown(gap.get(percent)) for percent in (50, 99, 100)),
        ", ".join(f"{count} {reason}" for reason, count in summary.failures.items()) or "0",
    )


def _shown(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "–"
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.1f}"
