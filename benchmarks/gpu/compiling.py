"""Compiles kernels on all processors at once, into the cache that later launches read."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks.gpu.candidates import Candidate, make_weights, num_parts


@dataclass(frozen=True, slots=True)
class Job:
    """A product to compile for.

    Attributes:
        candidate: how it is cut.
        is_flat: whether absmaxes are plain.
    """

    candidate: Candidate
    is_flat: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """How long it took, and what went wrong; empty for nothing."""

    job: Job
    seconds: float
    failure: str = ""


def compile_all(jobs: Sequence[Job], sm: int, limit_s: float) -> list[Compiled]:
    """Those that are done in time.

    Args:
        jobs: what to compile.
        sm: compute capability; the GPU need not be there.
        limit_s: what has not begun by then is left out.
    """
    found: list[Compiled] = []
    ends_s = time.perf_counter() + limit_s
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(sm,)) as pool:
        running = [pool.submit(_compile, job, sm) for job in jobs]
        try:
            for future in as_completed(running, timeout=max(0.0, ends_s - time.perf_counter())):
                found.append(future.result())
        except TimeoutError:
            pool.shutdown(wait=True, cancel_futures=True)
    return found


class _NoDevice:
    """What Triton asks a driver for, of a GPU that is not there."""

    def __init__(self, sm: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", sm, 32)

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """A number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Another one."""
        return 0


def _begin(sm: int) -> None:
    """In a process that compiles: launches compile, and launch nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_NoDevice(sm))
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only


def _compile(job: Job, sm: int) -> Compiled:
    import torch

    began_s = time.perf_counter()
    try:
        # Of sizes alone does what is compiled depend, and on whether they are multiples of 16.
        candidate, device = job.candidate, torch.device("cpu")
        rows, columns = candidate.bucket, candidate.shape[1]
        small = (256, columns)
        weights = make_weights(small, device, sm, flattens=job.is_flat, decodes=candidate.is_dense)
        x = torch.empty(rows, columns, dtype=torch.bfloat16)
        y, parts = torch.empty(rows, small[0]), torch.empty(num_parts(candidate, rows))
        weights.product(candidate, x, y, parts)
    except Exception:  # noqa: BLE001 - whatever it is, it is reported
        return Compiled(job, time.perf_counter() - began_s, traceback.format_exc(limit=-1))
    return Compiled(job, time.perf_counter() - began_s)
