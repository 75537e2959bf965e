"""Processor, threads and CUDA: which kernels run, on what, and what would be faster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from manyhats.engine.config import resolve
from manyhats.engine.threads.processors import num_processors
from manyhats.server.doctor.finding import Finding, failure, ok, warning
from manyhats.server.lifetime.cgroup import Cgroup
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.wiring import resolve_device

if TYPE_CHECKING:
    from manyhats.engine.backends.report import GpuReport, ProcessorReport

# Variables with which a user, or whoever made the image, may have bounded the kernels' threads.
_BOUNDS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS")


def report_processor(config: ServeConfig) -> ProcessorReport:
    """The processor as a server with these settings would use it."""
    from manyhats.engine.backends import open as backends

    settings = resolve(config.engine)
    return backends.report_processor(dtype=settings.dtype, num_threads=settings.num_threads)


def look_at_kernels(report: ProcessorReport) -> Iterator[Finding]:
    """Which instructions there are, and which kernels they give."""
    yield ok("processor", ", ".join(report.features) or "no vector instructions that the kernels know")
    for path in report.paths:
        advice = f"faster: {path.faster}" if path.faster else ""
        yield (warning if path.is_slow else ok)(path.work, path.path, advice)


def look_at_threads(report: ProcessorReport, config: ServeConfig, cgroup: Cgroup) -> Iterator[Finding]:
    """Whether there are as many threads as processors, and what runs them."""
    available, quota = num_processors(), cgroup.processors()
    text = f"{report.num_threads} for {available} processors"
    if (config.engine.num_threads or 0) > report.num_threads:
        text += f" (of the {config.engine.num_threads} given)"
    if quota is not None and report.num_threads > -(-quota // 1):
        yield warning(
            "threads",
            f"{text}, of which the container may use {quota:g}: the system stops them again and again",
            f"give --num-threads {max(int(quota), 1)}",
        )
    elif report.num_threads > available:
        yield warning("threads", f"{text}: they wait for each other", f"give --num-threads {available}")
    elif report.num_threads < available and not config.engine.num_threads and quota is None:
        bounds = [f"{name}={os.environ[name]}" for name in _BOUNDS if os.environ.get(name)]
        because = f", as {' and '.join(bounds)} says" if bounds else ", one per core"
        yield ok(
            "threads", f"{text}{because}", f"perhaps faster: --num-threads {available}" if bounds else ""
        )
    else:
        yield ok("threads", text)
    yield _layer(report.threads)
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        yield warning(
            "OpenMP",
            "OMP_WAIT_POLICY=active: threads without work keep their processors from everything else",
            "unset OMP_WAIT_POLICY",
        )


def _layer(threads: str) -> Finding:
    if threads == "omp":
        return ok("threads of the kernels", "OpenMP")
    advice = "install the OpenMP runtime (Debian's package libgomp1), and unset NUMBA_THREADING_LAYER"
    if threads == "workqueue":
        return failure(
            "threads of the kernels",
            "Numba's workqueue, which ends the process if two threads use it",
            advice,
        )
    return warning("threads of the kernels", f"{threads}, beside the OpenMP of torch", advice)


def look_at_device(config: ServeConfig, find: Callable[[], GpuReport] | None = None) -> Iterator[Finding]:
    """Which device is used, and why not a GPU."""
    from manyhats.engine.backends.open import report_gpu

    gpu = (find or report_gpu)()
    device = resolve_device(config.device, lambda: gpu)
    if device == "cuda":
        size = f"{gpu.num_bytes / 2**30:.0f} GiB"
        yield ok(
            "device", f"{device}; {gpu.name}, {size}, compute capability {'.'.join(map(str, gpu.capability))}"
        )
    elif not gpu.problem:
        yield warning(
            "device",
            f"{device}; {gpu.name} is not used",
            "give --device cuda, which has not been tried on a GPU yet: docs/gpu.md",
        )
    else:
        yield ok("device", f"{device}; {gpu.problem}")
