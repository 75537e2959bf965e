"""What a row of the table is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Judge = Literal["value", "ratio", "percent over", "difference"]
"""What is held against the floor: the figure; it over the other's; by how many percent it exceeds that; or by how
much."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A figure of one system in one case; of several variants, the one with the highest median is taken."""

    system: str
    case: str
    figure: str


BUSY = Pick("machine", "busy", "busy_cores")
"""Not a row: what else ran, taken while all systems were idle."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What must be reached.

    Attributes:
        plausible_from: a figure below it shows a disturbed measurement, not a good result.
    """

    bound: Literal["at least", "at most"]
    value: float
    plausible_from: float | None = None

    def is_met(self, value: float) -> bool:
        """Whether a figure reaches it."""
        return value >= self.value if self.bound == "at least" else value <= self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; ``subject`` is what ``--only`` names."""

    subject: str
    title: str
    unit: str
    ours: Pick
    against: Pick | None = None
    judge: Judge = "value"
    floor: Floor | None = None

    @property
    def is_timed(self) -> bool:
        """Whether what else the machine does can change it."""
        return self.unit not in _UNTIMED_UNITS


_UNTIMED_UNITS = ("bytes/parameter", "MiB", "blocks")


def at_least(value: float) -> Floor:
    """A lower bound."""
    return Floor("at least", value)


def at_most(value: float, plausible_from: float | None = None) -> Floor:
    """An upper bound."""
    return Floor("at most", value, plausible_from)
