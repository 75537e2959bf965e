"""Work beside the engine's: it has its own threads, and yields to the engine's (decision 32)."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# With 4, a busy thread gets three tenths of a processor that an engine thread also wants.
_NICENESS = 4
_MAX_NICENESS = 19


def background_threads(num_threads: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads yield to the process's others."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=begin_thread)


def begin_thread() -> None:
    """Have the calling thread yield to the process's others, for good."""
    # Its own OpenMP team would make the engine's threads sleep between loops (``in_own_thread``).
    torch.set_num_threads(1)
    torch.get_num_threads()
    _give_way()


def _give_way() -> None:
    """Lower the calling thread's priority, for good.

    Systems other than Linux have no priority per thread: there, nothing changes.
    """
    if sys.platform == "linux":
        thread_id = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread_id, min(niceness, _MAX_NICENESS))
