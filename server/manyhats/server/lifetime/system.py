"""Operating-system resources of the process: SIGINT and SIGTERM as events, and how many files it may have open."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = structlog.get_logger("manyhats.files")

# Enough for any number of callers; some systems allow a billion, or report no limit.
_ENOUGH = 65_536


class StopSignals:
    """``first`` is set by a first SIGINT or SIGTERM, ``second`` by the next.

    Attributes:
        number: the first signal's, once it has come.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.number = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the default handlers of both signals while this is entered."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _received(self, number: int) -> None:
        if self.first.is_set():
            self.second.set()
        else:
            self.number = number
            self.first.set()


async def wait_for_either(
    task: asyncio.Task[Any], event: asyncio.Event, timeout_s: float | None = None
) -> None:
    """Wait until ``task`` has ended, ``event`` is set or the time is up; neither is cancelled."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Connections that each port may have open; the other files are for adapters, logs and libraries."""

    grpc: int
    http: int


def raise_file_limit() -> int:
    """Raise the limit on open files as far as allowed, or as needed, and return it.

    Systems default to 1,024 for the sake of old programs, and leave it to others to ask for more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _log.debug("limit on open files raised", before=soft, now=wanted)
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def connection_limits(file_limit: int) -> ConnectionLimits:
    """How many connections leave enough files of ``file_limit`` for everything else."""
    return ConnectionLimits(grpc=min(file_limit // 2, 8192), http=min(file_limit // 8, 4096))
