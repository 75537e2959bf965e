"""The peak memory of the process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_FORGET_PEAK = "5"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Peak memory in bytes.

    Attributes:
        rss: peak resident memory on the host.
        cuda: peak memory allocated by torch on the CUDA device; 0 without one.
    """

    rss: int
    cuda: int


def forget_peak() -> None:
    """Reset the peak; on systems that cannot reset it, it remains the peak since the process started."""
    with suppress(OSError):
        _CLEAR_REFS.write_text(_FORGET_PEAK)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> PeakMemory:
    """The peak since the last ``forget_peak``."""
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return PeakMemory(rss=_peak_rss(), cuda=cuda)


def _peak_rss() -> int:
    """VmHWM if the system has it, since it can be reset."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
