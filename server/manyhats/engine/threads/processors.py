"""How many processors other processes take from this one, so that the engine can use fewer threads.

Each of a step's 250 parallel loops ends with its slowest thread. A thread that shares its processor with another
process is held up for whole time slices, several milliseconds, and every other thread of the loop waits for it: a step
on all processors then takes longer than one on those that are free.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
_WINDOW_S = 0.25
"""The system counts in hundredths of a second: over this period the count is accurate to a twentieth of a processor."""
_TAKEN = 0.5
"""A processor counts as taken once others use this much more than was counted before …"""
_FREE = 0.3
"""… and as free again once they use less than this much of it."""


class TakenProcessors:
    """Counts the processors that other processes keep busy, of those that this process may run on.

    Linux reports this in ``/proc/stat``; elsewhere none is ever taken. Not thread-safe.

    Args:
        read_busy_s: total seconds that these processors have been busy since some start; None if unknown.
        read_own_s: seconds of processor time that this process has used.
        clock: seconds of wall time.
    """

    def __init__(
        self,
        read_busy_s: Callable[[], float | None] | None = None,
        read_own_s: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_busy_s = read_busy_s or busy_seconds
        self._read_own_s = read_own_s
        self._clock = clock
        self._num_taken = 0
        self._at_s = clock()
        self._others_s = self._read_others_s()

    def count(self) -> int:
        """The number taken, measured over the last quarter of a second or more; cheap to call."""
        now_s = self._clock()
        elapsed_s = now_s - self._at_s
        if elapsed_s < _WINDOW_S or self._others_s is None:
            return self._num_taken
        others_s = self._read_others_s()
        if others_s is not None:
            self._num_taken = _rounded((others_s - self._others_s) / elapsed_s, self._num_taken)
        self._at_s, self._others_s = now_s, others_s
        return self._num_taken

    def _read_others_s(self) -> float | None:
        busy_s = self._read_busy_s()
        return None if busy_s is None else busy_s - self._read_own_s()


def num_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _rounded(used: float, before: int) -> int:
    """Whole processors of ``used`` ones; ``before`` stays if it is nearly right, so that the count does not flap."""
    more = int(used + 1 - _TAKEN)
    fewer = max(int(used + 1 - _FREE), 0)
    return max(more, min(before, fewer))


def busy_seconds() -> float | None:
    """Total seconds in which the processors that this process may run on were not idle; None if unknown.

    Time that a hypervisor gave to other machines counts as busy: this process did not have it either.
    """
    if sys.platform != "linux":
        return None
    try:
        text = _STAT.read_text()
    except OSError:
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in text.splitlines():
        name, _, counts = line.partition(" ")
        if name in mine:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_guests = map(int, counts.split())
            ticks += user + nice + system + irq + softirq + steal  # guests' time is part of user and nice
    return ticks / os.sysconf("SC_CLK_TCK")
