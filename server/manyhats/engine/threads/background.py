"""Work beside the engine's: it has its own threads, yields to the engine's, and is left a processor while it lasts."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from manyhats.engine.threads.processors import TakenProcessors

# With 4, a busy thread gets three tenths of a processor that an engine thread also wants.
_NICENESS = 4
_MAX_NICENESS = 19
# Work that comes in pieces, such as an upload's chunks, is one.
_LINGER_S = 0.02

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Knows whether any of its threads has work; thread-safe.

    Args:
        taken: counts processors that other processes take; by default as reported by the system.
    """

    def __init__(self, taken: TakenProcessors | None = None) -> None:
        self._taken = taken or TakenProcessors()
        self._lock = threading.Lock()
        self._num_working = 0
        self._last_s = float("-inf")

    @property
    def is_busy(self) -> bool:
        """Whether a thread is working, or just was; one that waits for the engine is not."""
        return self._num_working > 0 or time.monotonic() - self._last_s < _LINGER_S

    def num_to_leave(self) -> int:
        """Processors that the engine should leave to this work and to other processes; on the engine's thread.

        A step's loops end with their slowest thread: one fewer is better than one with half a processor.
        """
        return self._taken.count() + int(self.is_busy)

    def threads(self, num_threads: int, name: str, *, is_work: bool = True) -> ThreadPoolExecutor:
        """An executor whose threads yield to the process's others.

        Its calls count as work, unless ``is_work`` says that they mostly wait, as for a network.
        """
        if not is_work:
            return ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=begin_thread)
        return _Threads(self, num_threads, name)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count this block as work."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def wait_for(self, future: Future[T]) -> T:
        """Within work: wait for a result from the engine; the wait does not count as work.

        It counts as work again as soon as the engine's thread sets the result, so that the next step knows.
        """
        self._count(-1)
        future.add_done_callback(lambda _: self._count(+1))
        return future.result()

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_working += change
            self._last_s = time.monotonic()


class _Threads(ThreadPoolExecutor):
    def __init__(self, background: Background, num_threads: int, name: str) -> None:
        super().__init__(num_threads, thread_name_prefix=name, initializer=begin_thread)
        self._background = background

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def work() -> T:
            with self._background.working():
                return fn(*args, **kwargs)

        return super().submit(work)


def begin_thread() -> None:
    """Have the calling thread yield to the process's others, for good."""
    # Its own OpenMP team would make the engine's threads sleep between loops (``in_own_thread``).
    torch.set_num_threads(1)
    torch.get_num_threads()
    _give_way()


def _give_way() -> None:
    """Lower the calling thread's priority, for good.

    A step is about 250 parallel loops, and each ends with its slowest thread. Systems other than Linux have no priority
    per thread: there, nothing changes.
    """
    if sys.platform == "linux":
        thread_id = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread_id, min(niceness, _MAX_NICENESS))
