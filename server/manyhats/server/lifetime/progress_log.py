"""Progress of loading a model, as log lines, and a way to stop it."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event

import structlog

from manyhats.engine.progress import Progress

_log = structlog.get_logger("manyhats.loading")


class LoadingStopped(Exception):  # noqa: N818
    """Loading was stopped on purpose; raised within the thread that loads."""


class ProgressLog:
    """A ``Progress`` that logs the start and end of each stage, and updates every ``period_s`` in between.

    Called from the loading thread; ``stop`` may be called from any.
    """

    def __init__(self, *, period_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s = period_s
        self._clock = clock
        self._stopped = Event()
        self._logged = ("", 0, 0)
        self._logged_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress.

        Raises:
            LoadingStopped: ``stop`` was called.
        """
        if self._stopped.is_set():
            raise LoadingStopped(stage)
        now_s = self._clock()
        is_due = stage != self._logged[0] or done == total or now_s - self._logged_s >= self._period_s
        if not is_due or (stage, done, total) == self._logged:
            return
        self._logged, self._logged_s = (stage, done, total), now_s
        percent = round(100 * done / total) if total else 0
        _log.info("loading", stage=stage, done=done, total=total, percent=percent)

    def stop(self) -> None:
        """Make the next report end the loading."""
        self._stopped.set()


def both(first: Progress, second: Progress) -> Progress:
    """A ``Progress`` that reports to two others, in this order."""

    def report(stage: str, done: int, total: int) -> None:
        first(stage, done, total)
        second(stage, done, total)

    return report
