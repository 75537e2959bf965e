"""Settings for the doctor to look at, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from manyhats.server.doctor.finding import Condition, Finding
from manyhats.server.lifetime.config import ServeConfig

Make = Callable[..., ServeConfig]


def conditions(findings: Iterable[Any]) -> list[tuple[str, str]]:
    """Subject and condition of each finding."""
    return [(each.subject, each.condition.value) for each in findings if isinstance(each, Finding)]


def only(findings: Iterable[Any]) -> Finding:
    """The one finding."""
    (finding,) = (each for each in findings if isinstance(each, Finding))
    return finding


def bad(findings: Iterable[Any]) -> list[Finding]:
    """Those that are not ok."""
    return [each for each in findings if isinstance(each, Finding) and each.condition is not Condition.OK]
