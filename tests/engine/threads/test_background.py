"""Threads beside the engine's give way to them."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch

from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.compile import max_threads
from manyhats.engine.config import MIB, EngineConfig
from manyhats.engine.opening import open_engine
from manyhats.engine.request import ResponseOptions
from manyhats.engine.threads.background import background_threads
from manyhats.engine.threads.processors import TakenProcessors
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import collect, load_tiny, make_request, random_ids

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority is Linux's")


class Taken(TakenProcessors):
    """As many processors are taken as a test says."""

    num = 0

    def __init__(self) -> None:
        super().__init__(read_busy_s=lambda: None)

    def count(self) -> int:
        return self.num


@pytest.fixture
def taken() -> Taken:
    return Taken()


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux_only
def test_its_threads_alone_give_way() -> None:
    before = niceness()
    with background_threads(1, "test") as threads:
        assert threads.submit(niceness).result() > before
    assert niceness() == before


@linux_only
def test_thread_of_the_lowest_priority_keeps_it() -> None:
    def begin_in_the_lowest() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        with background_threads(1, "test") as threads:  # its threads begin as this one is
            return threads.submit(niceness).result()

    with ThreadPoolExecutor(1) as lowest:
        assert lowest.submit(begin_in_the_lowest).result() == 19


def test_its_threads_run_torch_s_loops_alone() -> None:
    before = torch.get_num_threads()
    try:
        with background_threads(1, "test") as threads:
            torch.set_num_threads(2)
            assert threads.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(max_threads() < 2, reason="one processor cannot be shared")
async def test_engine_leaves_a_processor_to_other_processes_and_none_to_its_own_work(
    tmp_path: Path, taken: Taken
) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", seed=13))
    seen: list[tuple[int, int]] = []
    engine = open_engine(
        model,
        EngineConfig(dtype="float32", num_threads=2, kv_cache_bytes=4 * MIB),
        lambda record: pytest.fail("no adapter is asked for"),
        backend=CpuBackend(2),
        taken=taken,
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
        taken.num = 1
        beside = await collect(engine, request)
        seen_beside = set(seen)
        seen.clear()
        taken.num = 0
        done = threading.Event()
        with background_threads(1, "test") as threads:
            threads.submit(done.wait)
            after = await collect(engine, request)
            done.set()
    finally:
        await engine.stop()
    assert (seen_alone, seen_beside, set(seen)) == ({(2, 2)}, {(1, 1)}, {(2, 2)})
    assert alone.tokens == beside.tokens == after.tokens
