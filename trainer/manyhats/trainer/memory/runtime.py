"""The machine that a training run would use, and the memory of its process itself."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from manyhats.trainer.memory.prediction import Machine
from manyhats.trainer.model.computation import resolve_computation
from manyhats.trainer.settings.settings import ModelSettings

_STATM = Path("/proc/self/statm")
_CUDA_CONTEXT_BYTES = 500 * 2**20
_TOKENIZER_BYTES_PER_TOKEN = 600
_WORK_BYTES = 92 * 2**20
"""Threads, buffers for matrix products, and what the allocator holds back; fitted to benchmarks.training.memory."""


def machine_of(model: ModelSettings, *, num_unread_tokens: int) -> Machine:
    """The machine that a training run would use; a CUDA device need not be present.

    On a CPU, this process has already loaded the libraries that a training process would load.

    Args:
        model: device and dtype.
        num_unread_tokens: vocabulary size of a tokenizer that has not been loaded yet.
    """
    if model.device == "cuda" and not torch.cuda.is_available():
        return Machine(
            device="cuda",
            element_bytes=4 if model.dtype == "float32" else 2,
            runtime_bytes=_CUDA_CONTEXT_BYTES,
        )
    computation = resolve_computation(model)
    element_bytes = computation.dtype.itemsize
    if computation.device.type == "cuda":
        return Machine(device="cuda", element_bytes=element_bytes, runtime_bytes=_CUDA_CONTEXT_BYTES)
    to_come = _WORK_BYTES + _TOKENIZER_BYTES_PER_TOKEN * num_unread_tokens
    return Machine(device="cpu", element_bytes=element_bytes, runtime_bytes=resident_bytes() + to_come)


def resident_bytes() -> int:
    """Resident memory of this process now; its peak so far if the system does not tell the current value."""
    with suppress(OSError):
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
