"""An event loop that tells how long each of its turns takes: nothing else is read, sent or begun meanwhile."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable


class TimedLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on a selector of its own, which sees each turn begin and end.

    Attributes:
        on_turn: called with the seconds of each turn, on the loop; what it takes itself is not counted.
    """

    def __init__(self) -> None:
        self.on_turn: Callable[[float], None] = lambda seconds: None
        super().__init__(_Selector(self))


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: TimedLoop) -> None:
        super().__init__()
        self._loop = loop
        self._began_s = time.perf_counter()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What has happened; a turn ends when the loop asks, and the next begins with the answer."""
        self._loop.on_turn(time.perf_counter() - self._began_s)
        events = super().select(timeout)
        self._began_s = time.perf_counter()
        return events
