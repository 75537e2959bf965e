"""How kernels are compiled: ahead of need, cached on disk under a name that follows their source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit

from manyhats.engine.model.directories import default_home

numba_config: Any = numba.config  # its members are made at run time


def _source_digest() -> str:
    """Changes with any file of this package: Numba itself only watches the file a kernel stands in."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_directory() -> Path:
    return default_home() / "kernels" / _source_digest()


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba_config.CACHE_DIR = str(_cache_directory())
# One pool of OpenMP threads where the platform has it: its threads sleep between kernels.
if "NUMBA_THREADING_LAYER" not in os.environ:
    numba_config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

kernel: Callable[..., Any] = njit(parallel=True, nogil=True, cache=True)
"""A kernel called from Python: runs on all threads, without the interpreter lock."""

inner: Callable[..., Any] = njit(cache=True)
"""A function of a kernel."""


def max_threads() -> int:
    """Threads that Numba was started with, the most that a kernel can use."""
    return int(numba_config.NUMBA_NUM_THREADS)
