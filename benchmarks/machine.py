"""Where and with what the figures were made."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "NUMBA_NUM_THREADS")
_PACKAGES = ("manyhats", "torch", "numba", "transformers", "bitsandbytes", "peft", "grpcio", "protobuf")


def machine_facts() -> Mapping[str, object]:
    """Processor, memory, load, versions and commit; what is unknown is None."""
    cpu = _cpu_info()
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain")),
    }


def busy_cores(seconds: float) -> float | None:
    """Cores that are busy now, or taken by other virtual machines; None where the system does not say.

    Asked while the measured systems are idle, it tells how much else runs. That matters more than its share
    of the time: threads that wait for each other in a loop lose many times what a neighbour takes, and each
    system loses another amount.
    """
    before = _processor_times()
    time.sleep(seconds)
    after = _processor_times()
    if before is None or after is None:
        return None
    busy, total = after[0] - before[0], after[1] - before[1]
    return busy / total * (os.cpu_count() or 1) if total else 0.0


def _processor_times() -> tuple[int, int] | None:
    """Busy and all ticks of all processors since the machine's start."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(text) for text in path.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less idle, and waiting for a disk


def _cpu_info() -> dict[str, str]:
    """The first processor's entries."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first, *_ = path.read_text().split("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
