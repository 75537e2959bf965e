"""The kernel that chooses tokens takes as long to compile as all others together: a second process does it meanwhile.

Numba compiles one function at a time in a process, and keeps what it compiled on disk, where the process that serves
then finds it. ``python -m manyhats.engine.backends.cpu.choosing.ahead`` is that second process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import torch

from manyhats.engine.backends.cpu.compile import numba_config
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.warmup import every_filter

_PATIENCE_S = 0.2
_log = structlog.get_logger(__name__)


@contextmanager
def choosing_compiled_ahead(on_wait: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Compiles that kernel beside what is done while this is entered, unless the disk has it or there is one processor.

    Args:
        on_wait: called several times a second while it is waited for; what it raises ends the waiting.

    Yields:
        What to call before the kernel is used: it returns when the kernel is there. Should the other process fail,
        which is logged, the kernel is compiled at its use.
    """
    if _is_compiled() or (os.cpu_count() or 1) < 2:
        yield lambda: None
        return
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,  # its end tells the child that this process is gone
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def wait() -> None:
        while child.poll() is None:
            on_wait()
            try:
                child.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                continue
        if child.returncode != 0:
            _log.warning("a kernel could not be compiled ahead and is compiled now", status=child.returncode)

    with child:
        try:
            yield wait
        finally:
            child.kill()


def _is_compiled() -> bool:
    """Whether Numba's cache has an index of the kernel, if only for another processor."""
    return any(Path(numba_config.CACHE_DIR).glob("*/sampling.choose-*.nbi"))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Compile the kernel for this machine, as the warm-up before the first request would."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    HostLogits(torch.zeros(1, 64), CpuKernels(1)).finish(every_filter())
    sys.stdout.flush()
    os._exit(0)  # the thread still reads, and would hold up the end


if __name__ == "__main__":
    main()
