"""Logging: structlog and the standard library's records alike, one line each, to stderr; loading, as it progresses."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from threading import Event
from typing import Literal

import structlog
from structlog.processors import ExceptionRenderer
from structlog.typing import ExcInfo, Processor

from manyhats.engine.progress import Progress
from manyhats.server.observability.tracebacks import without_messages

LogFormat = Literal["json", "text"]

_log = structlog.get_logger("manyhats.loading")


def configure_logs(log_format: LogFormat, level: str) -> None:
    """Send every log line of this process to stderr, as JSON or as text; stdout stays for the ready line.

    What an exception says is logged at the level ``debug`` alone.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    tracebacks = ExceptionRenderer() if level.lower() == "debug" else ExceptionRenderer(_without_message)
    # Tracebacks are plain: the renderers' defaults would print local variables, and so callers' prompts.
    if log_format == "json":
        render: list[Processor] = [tracebacks, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
        render = [tracebacks, console]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("manyhats").setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _without_message(exc_info: ExcInfo) -> str:
    return without_messages(exc_info[1])


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
