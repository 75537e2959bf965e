"""What a run gives: named figures, and the times they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Protocol

from benchmarks.workload import Case


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one run.

    Attributes:
        figures: by name; each has its unit in the name.
        times: every single time, in seconds, by what it is a time of.
    """

    figures: Mapping[str, float]
    times: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one system; ``case`` is a case's name, or that of another subject."""

    system: str
    variant: str
    case: str
    round: int
    measurement: Measurement


class System(Protocol):
    """Something that can run a case."""

    @property
    def name(self) -> str:
        """In rows and results."""
        ...

    def variants(self, case: Case) -> Sequence[str]:
        """The ways of running it that may be the best; one is "". Empty: it does not run this case."""
        ...

    def measure(self, case: Case, variant: str, seed: int) -> Measurement:
        """Runs it once; a seed means a new set of prompts."""
        ...


def throughput(
    case: Case,
    *,
    num_prompt_tokens: int,
    prefill_s: float,
    intervals_s: Sequence[float],
    steps_s: Sequence[float] | None = None,
) -> Measurement:
    """Of a run in which all sequences were prefilled, and then all decoded in every step.

    Args:
        case: what ran.
        num_prompt_tokens: of all sequences together.
        prefill_s: until the last sequence had its first token.
        intervals_s: from the end of one step to the end of the next.
        steps_s: of the steps alone, where that is known; what lies between two of them is not counted.
    """
    steps_s = intervals_s if steps_s is None else steps_s
    return Measurement(
        {
            "prefill_tokens_per_s": num_prompt_tokens / prefill_s,
            "decode_tokens_per_s": case.num_sequences / median(intervals_s),
            "mean_decode_tokens_per_s": case.num_sequences / fmean(intervals_s),
            "step_ms": 1000 * median(steps_s),
            "mean_step_ms": 1000 * fmean(steps_s),
        },
        {"prefill": [prefill_s], "interval": list(intervals_s), "step": list(steps_s)},
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest values."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
