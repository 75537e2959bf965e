"""How long the threads of a parallel loop spin before they sleep, and when they end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_SPIN_COUNT = "GOMP_SPINCOUNT"
_WAIT_POLICY = "OMP_WAIT_POLICY"
_TURNS = 500
"""About a microsecond per hundred; the gaps between a step's loops are a few microseconds."""
P = ParamSpec("P")
T = TypeVar("T")


def sleep_soon() -> None:
    """Make waiting OpenMP threads spin for microseconds, not milliseconds; call it before torch is imported.

    By default libgomp's threads spin for some milliseconds before they sleep. Beside other busy processes the thread
    they wait for is often not running at all, and the spinning keeps it from running: decoding becomes ten times
    slower. What a user has set in the environment stays.
    """
    if _WAIT_POLICY not in os.environ:
        os.environ.setdefault(_SPIN_COUNT, str(_TURNS))


async def in_own_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``work`` on a new thread and return its result.

    Loading a model runs parallel loops. OpenMP keeps the team of every thread that has run one until that thread ends;
    with more threads in teams than processors, the engine's would no longer spin between loops but sleep, and be woken
    250 times per step.
    """
    threads = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: work(*args, **kwargs))
    finally:
        threads.shutdown(wait=False)  # it ends on its own when it has no more work
