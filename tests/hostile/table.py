"""The whole table."""

from __future__ import annotations

from hostile import adapters, lifecycle, names, sources, texts, uploads, weights
from hostile.case import Case

CASES: tuple[Case, ...] = (
    *names.CASES,
    *sources.CASES,
    *texts.CASES,
    *adapters.CASES,
    *weights.CASES,
    *lifecycle.CASES,
    *uploads.CASES,
)
