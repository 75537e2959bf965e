"""Backends by name; nothing else knows them."""

from __future__ import annotations

from pathlib import Path

import torch

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.report import GpuReport, ProcessorReport
from manyhats.engine.errors import ModelError


def open_backend(
    name: str,
    *,
    dtype: str,
    num_threads: int = 0,
    limits: Limits | None = None,
    keeps_bits: bool = True,
) -> Backend:
    """Open a backend, which is imported only then.

    Args:
        name: ``cpu``, ``cuda``, or ``torch`` for the reference on the CPU.
        dtype: ``float32`` for exact arithmetic, ``bfloat16`` for what the processor does faster.
        num_threads: of a backend on the CPU; 0 for one per core.
        limits: of the engine, by which a device's own memory is divided.
        keeps_bits: of ``cuda`` in ``bfloat16``, whether a row has the same bits in every batch.

    Raises:
        ModelError: there is none with this name, or what it needs is not installed.
    """
    if name == "cpu":
        from manyhats.engine.backends.cpu.backend import CpuBackend

        return CpuBackend(num_threads or None, is_exact=dtype == "float32")
    if name == "torch":
        from manyhats.engine.backends.torch.backend import TorchBackend

        return TorchBackend()
    if name == "cuda":
        if keeps_bits and dtype == "bfloat16" and limits is not None:
            return _open_kernels(limits)
        from manyhats.engine.backends.torch.backend import TorchBackend

        return TorchBackend("cuda", dtype, limits=limits)
    raise ModelError(f"there is no backend {name!r}")


def _open_kernels(limits: Limits) -> Backend:
    try:
        from manyhats.engine.backends.cuda.backend import CudaBackend
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModelError(
            "the kernels for GPUs need Triton, which torch's builds for CUDA bring on Linux; install triton, or give "
            "--invariance fast"
        ) from None
    return CudaBackend("cuda", limits)


def kernel_directory() -> Path:
    """Where the backend ``cpu`` keeps compiled kernels; it cannot be imported if nothing can be written there."""
    from manyhats.engine.backends.cpu.compile import cache_directory

    return cache_directory()


def report_gpu() -> GpuReport:
    """The GPU that ``cuda`` would run on; a torch built for CPUs is not asked for one."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return GpuReport(torch=torch.__version__, is_for_cuda=torch.version.cuda is not None)
    properties = torch.cuda.get_device_properties(0)
    return GpuReport(
        torch=torch.__version__,
        is_for_cuda=True,
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_bytes=properties.total_memory,
    )


def report_processor(*, dtype: str, num_threads: int = 0) -> ProcessorReport:
    """What the backend ``cpu``, opened with these arguments, would make of this machine's processor."""
    from manyhats.engine.backends.cpu.report import report

    return report(num_threads=num_threads or None, is_exact=dtype == "float32")
