"""How long a queue takes, from how fast its entries have been finishing: what refused callers are told to wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_BUCKET_S = 0.5
_WINDOWS_S = (2.0, 10.0, 30.0)
"""The fastest of these counts: after a lull only the short one is full, and slow work shows only in the long one."""
_UNKNOWN_S = 1.0
_MIN_S = 0.1
_MAX_S = 60.0


class FinishRate:
    """Counts what finished recently. Thread-safe.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: deque[tuple[int, int]] = deque()  # (when, in buckets since the clock's zero; how many)

    def finished(self) -> None:
        """Count one finish."""
        with self._lock:
            now = self._now()
            count = self._buckets.pop()[1] if self._buckets and self._buckets[-1][0] == now else 0
            self._buckets.append((now, count + 1))
            self._forget(now)

    def per_second(self) -> float:
        """Finishes per second; 0 if none in half a minute."""
        with self._lock:
            now = self._now()
            self._forget(now)
            buckets = tuple(self._buckets)
        return max(
            sum(count for when, count in buckets if when > now - window_s / _BUCKET_S) / window_s
            for window_s in _WINDOWS_S
        )

    def num_since(self, when_s: float) -> int:
        """How many have finished since a moment of the clock, or in the last half minute."""
        with self._lock:
            buckets = tuple(self._buckets)
        return sum(count for when, count in buckets if when * _BUCKET_S >= when_s)

    def wait_s(self, num_ahead: int) -> float:
        """Seconds until this many have finished, in [0.1, 60]; 1 if unknown."""
        rate = self.per_second()
        return min(max(num_ahead / rate, _MIN_S), _MAX_S) if rate > 0 else _UNKNOWN_S

    def _now(self) -> int:
        return int(self._clock() // _BUCKET_S)

    def _forget(self, now: int) -> None:
        while self._buckets and self._buckets[0][0] <= now - max(_WINDOWS_S) / _BUCKET_S:
            self._buckets.popleft()
