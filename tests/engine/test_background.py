"""Threads beside the engine's give way to them, and to nobody else's cost."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from manyhats.engine.background import give_way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority is Linux's")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_only_the_thread_that_asks_gives_way() -> None:
    before = niceness()
    with ThreadPoolExecutor(1, initializer=give_way) as threads:
        assert threads.submit(niceness).result() > before
    assert niceness() == before


def test_thread_of_the_lowest_priority_keeps_it() -> None:
    with ThreadPoolExecutor(1) as threads:
        for _ in range(6):
            threads.submit(give_way).result()
        assert threads.submit(niceness).result() == 19
