"""SIGINT and SIGTERM as events, and waiting for one of two things."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
