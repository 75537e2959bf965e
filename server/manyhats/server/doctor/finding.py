"""What the doctor says of one subject."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Condition(Enum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as well or as safely as it should."""
    FAILURE = "failure"
    """It will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at, in a word or two.
        text: what was found.
        advice: what to do about it, or what would be faster; empty if nothing.
    """

    subject: str
    condition: Condition
    text: str
    advice: str = ""


def ok(subject: str, text: str, advice: str = "") -> Finding:
    """Nothing is wrong."""
    return Finding(subject, Condition.OK, text, advice)


def warning(subject: str, text: str, advice: str) -> Finding:
    """It works, but should be better."""
    return Finding(subject, Condition.WARNING, text, advice)


def failure(subject: str, text: str, advice: str) -> Finding:
    """It will not work."""
    return Finding(subject, Condition.FAILURE, text, advice)
