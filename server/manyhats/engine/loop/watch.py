"""Whether the engine's thread gets on, as another thread sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PERIOD_S = 0.2
_COMPUTING = 15.0
"""A long step computes; what waits for something that never comes does not. So a second of computing counts a part."""
_MIN_CPU_S = 0.001
"""Of a look. What waits with time limits takes less."""
_GENEROUS = 30.0
_DECAY = 0.998
"""A step: after 350 steps the slowest pace counts half."""


class Allowance:
    """How long a step may compute before it is more likely to never end; thread-safe.

    Kernels wait for each other awake, so one that hangs computes as one that takes long does. The rows of a step are
    known as it begins: it may take many times as long as they would at the slowest pace of late.

    Attributes:
        seconds: of what runs, or ran last; without limit until a step has run.
    """

    def __init__(self) -> None:
        self.seconds = float("inf")
        self._slowest_s = 0.0  # per row

    def begin(self, num_rows: int) -> None:
        """A step begins; so many rows are to run, with those of one that already does."""
        if self._slowest_s:
            self.seconds = _GENEROUS * self._slowest_s * num_rows

    def end(self, elapsed_s: float, num_rows: int) -> None:
        """A step of so many rows has run."""
        self._slowest_s = max(self._slowest_s * _DECAY, elapsed_s / num_rows)


class Watch:
    """Measures for how long the engine's thread has made no turn.

    Only time in which this process runs counts: it is added up look by look, each at most twice its period. So a
    process that was stopped, a machine that slept, or a clock that was set are no silence. Nothing here takes a lock
    that the engine's thread may hold.

    Args:
        heartbeat: the time of the last turn that was one; it counts for nothing but being another than before.
        is_stuck: whether it turns, but nothing gets on.
        allowed_s: for how long it may compute.

    Attributes:
        silent_s: seconds since its last turn while it waited, or computed longer than allowed; and a fifteenth of those
            in which it computed before.
    """

    def __init__(
        self,
        heartbeat: Callable[[], float],
        is_stuck: Callable[[], bool],
        allowed_s: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        self._heartbeat = heartbeat
        self._is_stuck = is_stuck
        self._allowed_s = allowed_s
        self._limit_s = float("inf")
        self._on_hang: Callable[[float], None] = lambda silent_s: None
        self._is_over = threading.Event()
        self._cpu_clock: int | None = None
        self.silent_s = 0.0

    def call_at(self, limit_s: float, on_hang: Callable[[float], None]) -> None:
        """Have ``on_hang`` called, on the watch's thread, each time that the silence reaches ``limit_s``."""
        self._limit_s, self._on_hang = limit_s, on_hang

    def start(self, thread: threading.Thread) -> None:
        """Watch a running thread until ``stop``."""
        # Not on every system; without it all time counts as that of a thread that computes.
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        if clock_of is not None and thread.ident is not None:
            self._cpu_clock = clock_of(thread.ident)
        threading.Thread(target=self._run, name="engine-watch", daemon=True).start()

    def stop(self) -> None:
        """End the watch; before the thread that is watched ends."""
        self._is_over.set()

    def _run(self) -> None:
        beat, cpu_s, looked_s = self._heartbeat(), self._cpu_s(), time.monotonic()
        waited_s = computed_s = 0.0
        while not self._is_over.wait(_PERIOD_S):
            now_s = time.monotonic()
            look_s, looked_s = min(now_s - looked_s, 2 * _PERIOD_S), now_s
            last_beat, beat = beat, self._heartbeat()
            last_cpu_s, cpu_s = cpu_s, self._cpu_s()
            if beat != last_beat:
                waited_s = computed_s = 0.0
            elif self._is_stuck() or cpu_s - last_cpu_s < _MIN_CPU_S:
                waited_s += look_s
            else:
                waited_s, computed_s = 0.0, computed_s + look_s
            long_s = min(computed_s, self._allowed_s())
            self._note(waited_s + long_s / _COMPUTING + computed_s - long_s)

    def _note(self, silent_s: float) -> None:
        was_hanging = self.silent_s >= self._limit_s
        self.silent_s = silent_s
        if silent_s >= self._limit_s and not was_hanging:
            self._on_hang(silent_s)

    def _cpu_s(self) -> float:
        """Processor seconds of the thread that is watched."""
        if self._cpu_clock is None:
            return time.monotonic()
        try:
            return time.clock_gettime(self._cpu_clock)
        except OSError:  # it has ended
            return 0.0
