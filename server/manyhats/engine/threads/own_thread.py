"""Work on a thread that ends with it, along with the threads of its parallel loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_own_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``work`` on a new thread and returns its result.

    Loading a model runs parallel loops. OpenMP keeps the team of every thread that has run one until that thread ends;
    with more threads in teams than processors, the engine's would no longer spin between loops but sleep, and be woken
    250 times per step.
    """
    threads = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: work(*args, **kwargs))
    finally:
        threads.shutdown(wait=False)  # it ends on its own when it has no more work
