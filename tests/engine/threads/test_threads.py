from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numba
import pytest
import torch

from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.threads.openmp import in_own_thread

T = TypeVar("T")


def on_new_thread(work: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_thread_has_the_kernels_threads_and_torch_leaves_the_others_one() -> None:
    kernels = CpuKernels(2)

    def numbers_of_the_engine_s_thread() -> tuple[int, int]:
        kernels.start_thread()
        torch.ones(1 << 20).add_(1)  # large enough to be shared out
        return torch.get_num_threads(), numba.get_num_threads()

    assert on_new_thread(numbers_of_the_engine_s_thread) == (2, 2)
    assert on_new_thread(torch.get_num_threads) == 1


async def test_work_on_a_thread_of_its_own_ends_with_that_thread() -> None:
    worker = await in_own_thread(threading.current_thread)
    async with asyncio.timeout(10):
        while worker.is_alive():  # noqa: ASYNC110 a thread has no event to wait for
            await asyncio.sleep(0.005)


async def test_errors_of_work_on_a_thread_of_its_own_reach_its_caller() -> None:
    def fail(text: str) -> None:
        raise ValueError(text)

    with pytest.raises(ValueError, match="no model"):
        await in_own_thread(fail, "no model")
