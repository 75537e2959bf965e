"""Compiles kernels on all processors at once, into the cache that later launches read."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu.candidates import Candidate, make_weights, num_parts
from benchmarks.gpu.model import make_model, random_lora
from benchmarks.gpu.plans import BLOCK, Part, greedy, plan_of
from benchmarks.gpu.scale import Shape
from manyhats.engine.backends.limits import Limits

_TOKENS = 17 * 4096
"""More than half the parts of a row that fit into the next power of two."""
_ARENA_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """A product to compile for.

    Attributes:
        candidate: how it is cut.
        is_flat: whether absmaxes are plain.
        is_rounded: whether the result is bfloat16.
    """

    candidate: Candidate
    is_flat: bool = False
    is_rounded: bool = False


@dataclass(frozen=True, slots=True)
class StepJob:
    """A step of the engine to compile for: one sequence of so many rows, on an adapter or on the base."""

    shape: Shape
    rows: int
    slot: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """How long it took, and what went wrong; empty for nothing."""

    job: Job | StepJob
    seconds: float
    failure: str = ""


def compile_all(jobs: Sequence[Job | StepJob], sm: int, limit_s: float) -> list[Compiled]:
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


def _compile(job: Job | StepJob, sm: int) -> Compiled:
    began_s = time.perf_counter()
    try:
        if isinstance(job, StepJob):
            launch_step(job, sm)
        else:
            _launch_product(job, sm)
    except Exception:  # noqa: BLE001 - whatever it is, it is reported
        return Compiled(job, time.perf_counter() - began_s, traceback.format_exc(limit=-1))
    return Compiled(job, time.perf_counter() - began_s)


def _launch_product(job: Job, sm: int) -> None:
    """What is compiled depends on types alone, and on whether sizes are multiples of 16."""
    candidate, device = job.candidate, torch.device("cpu")
    rows, columns = candidate.bucket, candidate.shape[1]
    small = (256, columns)
    weights = make_weights(small, device, sm, flattens=job.is_flat, decodes=candidate.is_dense)
    x = torch.empty(rows, columns, dtype=torch.bfloat16)
    y = torch.empty(rows, small[0], dtype=torch.bfloat16 if job.is_rounded else torch.float32)
    weights.product(candidate, x, y, torch.empty(num_parts(candidate, rows)))


def launch_step(job: StepJob, sm: int) -> None:
    """Launch it on one layer, and on as many tokens as take the same number of parts of a row of logits."""
    from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
    from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
    from manyhats.engine.backends.cuda.backend import LARGEST
    from manyhats.engine.backends.cuda.model import CudaModel, Device
    from manyhats.engine.backends.cuda.runtime import runtime_on

    device = torch.device("cpu")
    model = make_model(
        replace(job.shape, num_layers=1, vocab_size=min(_TOKENS, job.shape.vocab_size)), device
    )
    architecture = model.architecture
    limits = Limits(max_rows=job.rows, max_sequences=16, adapter_bytes=_ARENA_BYTES, memory_fraction=0.9)
    own = CudaModel(architecture, model.weights, Device(runtime_on(device), sm, 1), limits, LARGEST)
    blocks = -(-job.rows // BLOCK)
    cache = CudaKVCache(architecture, blocks, BLOCK, device)
    slots = CudaAdapterSlots(architecture, 2, _ARENA_BYTES, LARGEST, runtime_on(device))
    slots.place(1, slots.pack(random_lora(architecture, 16, "compiled")))
    plan = plan_of([Part(0, 0, job.rows, job.slot)], blocks, architecture.vocab_size)
    own.forward(plan, cache, slots).finish(greedy(1, architecture.vocab_size))
