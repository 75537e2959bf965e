"""Threads that work beside the engine's: where processors are short, the engine's go first."""

from __future__ import annotations

import os
import sys
import threading

# With 4, a busy thread gets three tenths of a processor that one of the engine's wants, too.
_NICENESS = 4
_MAX_NICENESS = 19


def give_way() -> None:
    """Lower the calling thread's priority, for good; for the ``initializer`` of an executor.

    A step is about 250 parallel loops, and each ends with its slowest thread. Other systems than Linux have no
    priority of a thread by itself: there nothing changes.
    """
    if sys.platform == "linux":
        thread_id = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread_id, min(niceness, _MAX_NICENESS))
