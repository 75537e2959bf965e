"""A stream's outputs that its reader has not taken yet: bounded, so that unread answers take little memory."""

from __future__ import annotations

import time
from collections import deque

from manyhats.engine.output import StepOutput


class Backlog:
    """Counts one generation's undelivered outputs.

    The reader calls ``take``, the engine's thread everything else. Each count is changed by only one of them, and a
    deque's ends are safe for two, so no lock is needed.

    Args:
        max_outputs: full from this number on.
        max_bytes: full from this size on.
        limit_s: how long it may stay full without anything being taken.
    """

    def __init__(self, max_outputs: int, max_bytes: int, limit_s: float) -> None:
        self._max_outputs = max_outputs
        self._max_bytes = max_bytes
        self.limit_s = limit_s
        self._num_put = self._num_taken = 0
        self._bytes_put = self._bytes_taken = 0
        self._sizes: deque[int] = deque()  # of what is not taken
        self._full_s = self._taken_s = 0.0
        self.is_awaited = False

    def put(self, output: StepOutput) -> None:
        """Count an output on its way to the reader."""
        size = output.num_bytes
        self._sizes.append(size)
        self._num_put += 1
        self._bytes_put += size

    def take(self, count: int) -> bool:
        """Count so many outputs as read; returns whether the engine is waiting for that."""
        self._num_taken += count
        for _ in range(count):
            self._bytes_taken += self._sizes.popleft()
        self._taken_s = time.monotonic()
        return self.is_awaited and self.has_room

    @property
    def is_full(self) -> bool:
        """Whether the reader must take outputs before more are computed."""
        return not self._is_under(1)

    @property
    def has_room(self) -> bool:
        """Whether to resume: half of it must be free, so that a slow reader causes few pauses."""
        return self._is_under(2)

    def wait(self) -> None:
        """Note that the engine is waiting for the reader from now on."""
        self.is_awaited = True
        self._full_s = time.monotonic()

    def is_given_up(self, now_s: float) -> bool:
        """Whether the engine has waited longer than the limit without the reader taking anything."""
        return now_s - max(self._full_s, self._taken_s) > self.limit_s

    def _is_under(self, parts: int) -> bool:
        return (
            parts * (self._num_put - self._num_taken) < self._max_outputs
            and parts * (self._bytes_put - self._bytes_taken) < self._max_bytes
        )
