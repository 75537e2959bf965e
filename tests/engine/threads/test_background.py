"""Threads beside the engine's give way to them, and are left a processor while they work."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch

from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.compile import max_threads
from manyhats.engine.config import MIB, EngineConfig
from manyhats.engine.opening import open_engine
from manyhats.engine.request import ResponseOptions
from manyhats.engine.threads import background as module
from manyhats.engine.threads.background import Background
from manyhats.engine.threads.processors import TakenProcessors
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, random_ids

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority is Linux's")


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Background:
    """One that forgets at once, on a machine of its own."""
    monkeypatch.setattr(module, "_LINGER_S", 0.0)
    return Background(TakenProcessors(read_busy_s=lambda: None))


def wait_until(condition: Callable[[], bool]) -> None:
    """For something that another thread brings about."""
    limit_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.001)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux_only
def test_its_threads_alone_give_way(background: Background) -> None:
    before = niceness()
    with background.threads(1, "test") as threads:
        assert threads.submit(niceness).result() > before
    assert niceness() == before


@linux_only
def test_thread_of_the_lowest_priority_keeps_it(background: Background) -> None:
    def begin_in_the_lowest() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        with background.threads(1, "test") as threads:  # its threads begin as this one is
            return threads.submit(niceness).result()

    with ThreadPoolExecutor(1) as lowest:
        assert lowest.submit(begin_in_the_lowest).result() == 19


def test_its_threads_run_torch_s_loops_alone(background: Background) -> None:
    before = torch.get_num_threads()
    try:
        with background.threads(1, "test") as threads:
            torch.set_num_threads(2)
            assert threads.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_busy_while_a_call_runs_however_it_ends(background: Background) -> None:
    def fail() -> None:
        assert background.is_busy
        raise ValueError("on purpose")

    assert not background.is_busy
    with background.threads(2, "test") as threads:
        assert threads.submit(lambda: background.is_busy).result()
        with pytest.raises(ValueError, match="on purpose"):
            threads.submit(fail).result()
    assert not background.is_busy


def test_busy_until_the_last_of_several_calls_ends(background: Background) -> None:
    first, second = threading.Event(), threading.Event()
    with background.threads(2, "test") as threads:
        calls = [threads.submit(event.wait) for event in (first, second)]
        first.set()
        calls[0].result()
        assert background.is_busy
        second.set()
    assert not background.is_busy


def test_not_busy_while_its_only_call_waits_for_the_engine(background: Background) -> None:
    result: Future[int] = Future()
    with background.threads(1, "test") as threads:
        call = threads.submit(background.wait_for, result)
        wait_until(lambda: not background.is_busy)
        assert not call.done()
        result.set_result(3)
        assert call.result() == 3
    assert not background.is_busy


def test_a_call_that_waits_for_the_engine_gets_its_error(background: Background) -> None:
    result: Future[int] = Future()
    result.set_exception(ValueError("on purpose"))
    with background.working():
        with pytest.raises(ValueError, match="on purpose"):
            background.wait_for(result)
        assert background.is_busy
    assert not background.is_busy


class Awaited(Future[int]):
    """Says when somebody has begun to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_awaited = threading.Event()

    def add_done_callback(self, fn: Callable[[Future[int]], object]) -> None:
        super().add_done_callback(fn)
        self.is_awaited.set()


def test_work_goes_on_from_when_the_engine_is_done_with_it(background: Background) -> None:
    result = Awaited()

    def work() -> None:
        background.wait_for(result)
        assert background.is_busy

    with background.threads(1, "test") as threads:
        call = threads.submit(work)
        assert result.is_awaited.wait(60)
        assert not background.is_busy
        # Before the thread that waits has woken up: the engine must know before its next step.
        result.add_done_callback(lambda _: busy_at_once.append(background.is_busy))
        busy_at_once: list[bool] = []
        result.set_result(3)
        call.result()
    assert busy_at_once == [True]


def test_busy_a_moment_longer_than_the_work_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER_S", 1e9)
    lingering = Background()
    with lingering.working():
        pass
    assert lingering.is_busy


def test_arguments_and_results_pass_through(background: Background) -> None:
    def joined(*parts: str, end: str) -> str:
        return "".join(parts) + end

    with background.threads(1, "test") as threads:
        assert threads.submit(joined, "a", "b", end="!").result() == "ab!"


@pytest.mark.skipif(max_threads() < 2, reason="one processor cannot be shared")
async def test_engine_leaves_a_processor_to_work_and_takes_it_back(
    tmp_path: Path, background: Background
) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=13))
    seen: list[tuple[int, int]] = []
    engine = open_engine(
        model,
        EngineConfig(dtype="float32", num_threads=2, kv_cache_bytes=4 * MIB),
        lambda record: pytest.fail("no adapter is asked for"),
        backend=CpuBackend(2),
        background=background,
    )
    engine.loop.on_step = lambda stats: seen.append((numba.get_num_threads(), torch.get_num_threads()))
    request = make_request(
        random_ids(9, 12, TINY_VOCAB_SIZE), response=ResponseOptions(logprobs=True, top_logprobs=5)
    )
    await engine.start()
    try:
        alone = await collect(engine, request)
        seen_alone = set(seen)
        seen.clear()
        with background.working():
            beside = await collect(engine, request)
        seen_beside = set(seen)
        seen.clear()
        after = await collect(engine, request)
    finally:
        await engine.stop()
    assert (seen_alone, seen_beside, set(seen)) == ({(2, 2)}, {(1, 1)}, {(2, 2)})
    assert alone.tokens == beside.tokens == after.tokens
