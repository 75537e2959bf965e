"""The engine notices which processors other processes take, and leaves them those."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.threads.openmp import sleep_soon
from manyhats.engine.threads.processors import TakenProcessors, busy_seconds, num_processors


class Machine:
    """A machine whose processors others use as a test says; this process uses ``own`` of them."""

    def __init__(self, own: float = 2.0) -> None:
        self.own = own
        self.now_s = self.own_s = self.busy_s = 0.0
        self.taken = TakenProcessors(lambda: self.busy_s, lambda: self.own_s, lambda: self.now_s)

    def run(self, others: float, seconds: float = 1.0) -> int:
        """The count after others have used so many processors for a while."""
        self.now_s += seconds
        self.own_s += self.own * seconds
        self.busy_s += (self.own + others) * seconds
        return self.taken.count()


@pytest.mark.parametrize(
    ("others", "taken"), [(0.0, 0), (0.2, 0), (0.45, 0), (0.6, 1), (1.0, 1), (1.4, 1), (1.6, 2), (7.9, 8)]
)
def test_processors_that_others_keep_busy_are_taken(others: float, taken: int) -> None:
    assert Machine().run(others) == taken


def test_count_follows_what_others_do() -> None:
    machine = Machine()
    assert [machine.run(others) for others in (0.0, 1.0, 3.0, 1.0, 0.0)] == [0, 1, 3, 1, 0]


def test_count_does_not_flap_while_others_use_about_half_a_processor() -> None:
    machine = Machine()
    machine.run(0.6)
    assert [machine.run(others) for others in (0.48, 0.52, 0.45, 0.4)] == [1] * 4
    assert [machine.run(others) for others in (0.2, 0.45, 0.48)] == [0] * 3


def test_processor_time_of_its_own_does_not_count() -> None:
    assert Machine(own=16.0).run(0.0) == 0


def test_nothing_new_is_measured_within_a_quarter_of_a_second() -> None:
    machine = Machine()
    assert machine.run(2.0, seconds=0.1) == 0
    assert machine.run(2.0, seconds=0.2) == 2


def test_where_the_system_says_nothing_no_processor_is_taken() -> None:
    now = iter(range(100))
    taken = TakenProcessors(lambda: None, lambda: 0.0, lambda: float(next(now)))
    assert [taken.count() for _ in range(3)] == [0, 0, 0]


@given(st.lists(st.floats(0, 64), min_size=1, max_size=20))
def test_count_is_never_more_than_a_processor_from_what_others_use(uses: list[float]) -> None:
    machine = Machine()
    for others in uses:
        assert abs(machine.run(others) - others) < 1.0 + 1e-6
        assert machine.run(others) in (math.floor(others), math.ceil(others))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's accounting")
def test_system_s_own_accounting_shows_a_busy_neighbour() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        try:
            before_s, own_s = busy_seconds(), time.process_time()
            limit_s = time.monotonic() + 60
            while True:  # until it has run for a while, however busy the machine is
                time.sleep(0.1)
                now_s = busy_seconds()
                assert before_s is not None
                assert now_s is not None
                if now_s - before_s - (time.process_time() - own_s) > 0.3:
                    break
                assert time.monotonic() < limit_s
        finally:
            busy.kill()


def test_there_is_a_processor() -> None:
    assert 1 <= num_processors() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("given_variables", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT"}),
    ],
)
def test_threads_sleep_soon_unless_a_user_says_otherwise(
    given_variables: dict[str, str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)
    for name, value in given_variables.items():
        monkeypatch.setenv(name, value)
    sleep_soon()
    assert {name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == expected
    assert {name: os.environ[name] for name in given_variables} == given_variables
