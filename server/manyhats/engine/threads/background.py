"""Work beside the engine's: it has threads of its own, gives way to the engine's, and is left a processor meanwhile."""

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

# With 4, a busy thread gets three tenths of a processor that one of the engine's wants, too.
_NICENESS = 4
_MAX_NICENESS = 19
# Work that comes in pieces, such as an upload's chunks, is one.
_LINGER_S = 0.02

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Knows whether any of its threads has work; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_working = 0
        self._last_s = float("-inf")

    @property
    def is_busy(self) -> bool:
        """Whether a thread works, or did just now; one that waits for the engine does not."""
        return self._num_working > 0 or time.monotonic() - self._last_s < _LINGER_S

    def threads(self, num_threads: int, name: str) -> ThreadPoolExecutor:
        """An executor whose threads give way to others of the process, and whose calls count as work."""
        return _Threads(self, num_threads, name)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What is done in this block is work."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def wait_for(self, future: Future[T]) -> T:
        """In the midst of work: the result of what the engine does for it. Until it is there, the work is none.

        It is work again from when the engine's thread sets the result, so that the next step knows of it.
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
        super().__init__(num_threads, thread_name_prefix=name, initializer=_begin)
        self._background = background

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def work() -> T:
            with self._background.working():
                return fn(*args, **kwargs)

        return super().submit(work)


def _begin() -> None:
    # A team of OpenMP threads of its own would make the engine's sleep between loops (``own_thread``).
    torch.set_num_threads(1)
    torch.get_num_threads()
    _give_way()


def _give_way() -> None:
    """Lower the calling thread's priority, for good.

    A step is about 250 parallel loops, and each ends with its slowest thread. Other systems than Linux have no
    priority of a thread by itself: there nothing changes.
    """
    if sys.platform == "linux":
        thread_id = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread_id, min(niceness, _MAX_NICENESS))
