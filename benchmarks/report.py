"""From samples to the table and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import Sample
from benchmarks.rows import Judge, Pick, Row


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
        is_met: None without a floor.
    """

    row: Row
    ours: Summary
    against: Summary | None
    against_variant: str
    judged: Summary
    is_met: bool | None


def evaluate(rows: Sequence[Row], samples: Sequence[Sample]) -> list[Result]:
    """The rows that the samples have figures for."""
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
                is_met=None if row.floor is None else row.floor.is_met(judged.median),
            )
        )
    return results


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
    ratios = [ours[index] / against[index] for index in ours.keys() & against.keys()]
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
                {None: "", True: "ok", False: "MISSED"}[result.is_met],
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
    return _span(result.judged, "x" if result.row.judge == "ratio" else "%")


def _floor(result: Result) -> str:
    floor = result.row.floor
    if floor is None:
        return ""
    sign = "≥" if floor.bound == "at least" else "≤"
    unit = {"ratio": "x", "percent over": "%", "value": ""}[result.row.judge]
    return f"{sign} {floor.value:g}{unit}"


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
