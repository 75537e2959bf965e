"""Whether a thread gets on, as another sees it: what waits is told from what computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from manyhats.engine.loop.watch import Allowance, Watch


class Turning:
    """A thread whose heart beats until it is to do something else."""

    def __init__(self) -> None:
        self.heartbeat_s = 0.0
        self.is_stuck = False
        self.allowed_s = float("inf")
        self.does: Callable[[], None] = lambda: None
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            self.does()
            if not self.is_stuck:
                self.heartbeat_s += 1.0
            time.sleep(0.01)


@contextmanager
def watched() -> Iterator[tuple[Turning, Watch, list[float]]]:
    turning, hangs = Turning(), list[float]()
    watch = Watch(lambda: turning.heartbeat_s, lambda: turning.is_stuck, lambda: turning.allowed_s)
    watch.call_at(0.8, hangs.append)
    thread = threading.Thread(target=turning.run)
    thread.start()
    watch.start(thread)
    try:
        yield turning, watch, hangs
    finally:
        turning.ends.set()
        thread.join()
        watch.stop()


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> float:
    """How long it takes."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s
        time.sleep(0.01)
    return time.monotonic() - started


def test_a_heart_that_beats_is_not_silent() -> None:
    with watched() as (_, watch, hangs):
        time.sleep(1.5)
        assert watch.silent_s < 0.8
        assert not hangs


def test_what_waits_for_ever_hangs_and_is_told_once_each_time() -> None:
    with watched() as (turning, watch, hangs):
        for number in (1, 2):
            wakes = threading.Event()
            turning.does = wakes.wait  # type: ignore[assignment]
            until(lambda number=number: len(hangs) == number)  # type: ignore[misc]
            time.sleep(0.5)
            assert len(hangs) == number
            assert watch.silent_s >= hangs[-1] >= 0.8
            turning.does = lambda: None
            wakes.set()
            until(lambda: watch.silent_s < 0.5)


def test_what_is_locked_out_hangs() -> None:
    lock = threading.Lock()
    with watched() as (turning, _, hangs):
        with lock:
            turning.does = lambda: lock.acquire() and lock.release()  # type: ignore[assignment,func-returns-value]
            until(lambda: len(hangs) == 1)
        turning.does = lambda: None


def test_a_long_step_that_computes_is_silent_for_a_small_part_of_its_time() -> None:
    computes = threading.Event()

    def compute() -> None:
        while not computes.is_set():
            sum(range(1000))

    with watched() as (turning, watch, hangs):
        turning.does = compute
        time.sleep(3)
        assert not hangs
        assert watch.silent_s > 0
        watch.call_at(0.3, hangs.append)
        until(lambda: len(hangs) == 1)
        computes.set()


def test_what_computes_for_longer_than_is_allowed_hangs() -> None:
    computes = threading.Event()

    def compute() -> None:
        while not computes.is_set():
            sum(range(1000))

    with watched() as (turning, watch, hangs):
        turning.allowed_s, turning.does = 1.0, compute
        assert until(lambda: len(hangs) == 1) > 1.5
        computes.set()
        until(lambda: watch.silent_s < 0.5)


def test_a_step_is_allowed_many_times_what_its_rows_take_at_the_slowest_pace() -> None:
    allowance = Allowance()
    allowance.begin(1)
    assert allowance.seconds == float("inf"), "the first says nothing yet"
    allowance.end(0.01, 1)
    allowance.begin(512)
    assert allowance.seconds >= 20 * 0.01 * 512
    allowance.end(0.5, 512)  # many rows at once take less each
    allowance.begin(1)
    assert 0.2 <= allowance.seconds <= 1
    for _ in range(3000):  # a machine that has become faster
        allowance.begin(1)
        allowance.end(0.001, 1)
    allowance.begin(1)
    assert allowance.seconds < 0.1


def test_turns_in_which_nothing_gets_on_are_silent() -> None:
    with watched() as (turning, watch, hangs):
        turning.is_stuck = True
        until(lambda: len(hangs) == 1)
        turning.is_stuck = False
        until(lambda: watch.silent_s < 0.5)


def test_a_thread_that_has_ended_is_no_fault_of_the_watch() -> None:
    with watched() as (turning, watch, _):
        turning.ends.set()
        until(lambda: watch.silent_s > 0.5)
