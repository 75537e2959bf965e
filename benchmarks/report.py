"""From samples to the table and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.measure import Sample
from benchmarks.row import BUSY, Judge, Pick, Row

Verdict = Literal["", "ok", "MISSED", "DOUBTFUL"]
"""DOUBTFUL: other work disturbed the machine, or the figure cannot be true."""

MAX_BUSY_CORES = 0.2
"""More than that besides the benchmark, and no time it takes is to be trusted."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one figure over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row with its figures.

    Attributes:
        against_variant: which of the other system's variants was the best, and so is the one compared with.
        judged: the figure that the floor is for, of the rounds each by itself.
        verdict: on the floor; "" without one.
    """

    row: Row
    ours: Summary
    against: Summary | None
    against_variant: str
    judged: Summary
    verdict: Verdict


def disturbance(samples: Sequence[Sample]) -> float:
    """The most cores that were busy while every measured system was idle; 0 where the machine does not say."""
    return max((cores for _, cores in busy_moments(samples)), default=0.0)


def busy_moments(samples: Sequence[Sample]) -> list[tuple[Sample, float]]:
    """Each look at what else the machine did, and how many cores were busy then."""
    return [
        (sample, sample.measurement.figures[BUSY.figure])
        for sample in samples
        if (sample.system, sample.case) == (BUSY.system, BUSY.case)
    ]


def evaluate(rows: Sequence[Row], samples: Sequence[Sample]) -> list[Result]:
    """The rows that the samples have figures for."""
    is_disturbed = disturbance(samples) > MAX_BUSY_CORES
    results = []
    for row in rows:
        _, ours = _values(row.ours, samples)
        variant, against = ("", {}) if row.against is None else _values(row.against, samples)
        if not ours or (row.against is not None and not ours.keys() & against.keys()):
            continue
        judged = Summary.of(_judge(row.judge, ours, against))
        results.append(
            Result(
                row=row,
                ours=Summary.of(ours.values()),
                against=Summary.of(against.values()) if against else None,
                against_variant=variant,
                judged=judged,
                verdict=_verdict(row, judged.median, is_disturbed),
            )
        )
    return results


def _verdict(row: Row, value: float, is_disturbed: bool) -> Verdict:
    floor = row.floor
    if floor is None:
        return ""
    is_implausible = floor.plausible_from is not None and value < floor.plausible_from
    if is_implausible or (is_disturbed and row.is_timed):
        return "DOUBTFUL"
    return "ok" if floor.is_met(value) else "MISSED"


def _values(pick: Pick, samples: Sequence[Sample]) -> tuple[str, Mapping[int, float]]:
    """The best variant, and its figure by round."""
    variants: dict[str, dict[int, float]] = {}
    for sample in samples:
        if (sample.system, sample.case) == (pick.system, pick.case):
            value = sample.measurement.figures.get(pick.figure)
            if value is not None:
                variants.setdefault(sample.variant, {})[sample.round] = value
    return max(variants.items(), key=lambda item: median(item[1].values()), default=("", {}))


def _judge(judge: Judge, ours: Mapping[int, float], against: Mapping[int, float]) -> list[float]:
    if judge == "value":
        return list(ours.values())
    both = ours.keys() & against.keys()
    if judge == "difference":
        return [ours[index] - against[index] for index in both]
    ratios = [ours[index] / against[index] for index in both]
    return ratios if judge == "ratio" else [100 * (ratio - 1) for ratio in ratios]


def table(results: Sequence[Result]) -> str:
    """One line per row: median (min–max) over the rounds."""
    lines = [("", "manyhats", "against", "", "compared", "floor", "")]
    for result in results:
        lines.append(
            (
                f"{result.row.subject}: {result.row.title}",
                _span(result.ours),
                "" if result.against is None else _span(result.against),
                _unit(result),
                "" if result.row.judge == "value" else _judged(result),
                _floor(result),
                result.verdict,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _unit(result: Result) -> str:
    return f"{result.row.unit} ({result.against_variant})" if result.against_variant else result.row.unit


def _span(summary: Summary, unit: str = "") -> str:
    low, high = _number(summary.min), _number(summary.max)
    return f"{_number(summary.median)}{unit}" + (f" ({low}–{high})" if low != high else "")


def _judged(result: Result) -> str:
    return _span(result.judged, _judged_unit(result.row))


def _judged_unit(row: Row) -> str:
    return {"ratio": "x", "percent over": "%", "difference": f" {row.unit}", "value": ""}[row.judge]


def _floor(result: Result) -> str:
    floor = result.row.floor
    if floor is None:
        return ""
    sign = "≥" if floor.bound == "at least" else "≤"
    return f"{sign} {floor.value:g}{_judged_unit(result.row)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def document(
    *,
    settings: Mapping[str, object],
    machine: Mapping[str, object],
    samples: Sequence[Sample],
    results: Sequence[Result],
) -> str:
    """Everything as JSON: each run's figures and times, and the rows made of them."""
    content = {
        "format": 1,
        "settings": settings,
        "machine": machine,
        "rows": [asdict(result) for result in results],
        "samples": [asdict(sample) for sample in samples],
    }
    return json.dumps(content, indent=1) + "\n"


def write(path: Path, text: str) -> None:
    """Writes the file, and the directories it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
