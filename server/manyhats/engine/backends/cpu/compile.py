"""How kernels are compiled: ahead of need, cached on disk under a name that follows their source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core import event

from manyhats.engine.home import default_home
from manyhats.engine.progress import Progress

_EVENT = "numba:compile"

numba_config: Any = numba.config  # its members are made at run time


def _source_digest() -> str:
    """Changes with any file of this package and those in it: Numba itself only watches the file a kernel stands in."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    """Where compiled kernels are kept: where Numba's own variable says, else in the home, apart for each source."""
    configured = os.environ.get("NUMBA_CACHE_DIR")
    return Path(configured) if configured else default_home() / "kernels" / _source_digest()


numba_config.CACHE_DIR = str(cache_directory())
# One pool of OpenMP threads where the platform has it: its threads sleep between kernels.
if "NUMBA_THREADING_LAYER" not in os.environ:
    numba_config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

_functions: list[Any] = []


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel called from Python: runs on all threads, without the interpreter lock."""
    return _noted(njit(parallel=True, nogil=True, cache=True, error_model="numpy")(function))


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function inside a kernel, which Python must not call.

    It has no wrappers for that, which saves a quarter of its compilation. It raises nothing, since the
    others would wait forever for a thread that left its loop.
    """
    without_wrappers: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return _noted(njit(cache=True, error_model="numpy", **without_wrappers)(function))


def _noted(compiled: Callable[..., Any]) -> Callable[..., Any]:
    _functions.append(compiled)
    return compiled


@contextmanager
def counted_compilation(progress: Progress) -> Iterator[None]:
    """Reports the stage ``compile`` where kernels must be compiled, and nothing where the disk has them all.

    Compiling goes on for as long as this is entered; at the end every function counts as done, those that a model does
    not need too. What ``progress`` raises comes out of the call that compiles.
    """
    counter = _Counter(progress)
    event.register(_EVENT, counter)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        event.unregister(_EVENT, counter)  # type: ignore[no-untyped-call]
    counter.finish()


class _Counter(event.Listener):
    """Counts the functions whose compilation has begun."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun: set[int] = set()

    def on_start(self, event: Any) -> None:
        """Report that a function's compilation begins."""
        dispatcher = event.data["dispatcher"]
        if any(dispatcher is each for each in _functions):
            self._progress("compile", len(self._begun), len(_functions))
            self._begun.add(id(dispatcher))

    def on_end(self, event: Any) -> None:
        """Do nothing: the next start implies the end."""

    def finish(self) -> None:
        """Report the end, if there was a beginning."""
        if self._begun:
            self._progress("compile", len(_functions), len(_functions))


def max_threads() -> int:
    """Threads that Numba was started with, the most that a kernel can use."""
    return int(numba_config.NUMBA_NUM_THREADS)
