"""What happens beside a measurement: a process that keeps a processor busy, and the memory that others take."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)
_PARENT = re.compile(r"^PPid:\s+(\d+)$", re.MULTILINE)
_INTERVAL_S = 0.2
_KIB_PER_MIB = 1024

_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:  # however this benchmark ends, its processor is free again
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_process() -> Iterator[None]:
    """One process that computes all the time, until the end."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class MemoryWatch:
    """The most memory that a process and its descendants had resident together; shared pages count once.

    Attributes:
        peak_mib: until now; None where the system does not say.
    """

    def __init__(self, pid: int) -> None:
        self.peak_mib: float | None = None
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(_INTERVAL_S)
            sizes = [size for pid in family(self._pid) if (size := _resident_kib(pid)) is not None]
            if sizes:
                self.peak_mib = max(self.peak_mib or 0.0, sum(sizes) / _KIB_PER_MIB)


def family(pid: int) -> set[int]:
    """A process and all its descendants; only itself where the system does not say."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        found = _PARENT.search(_read(path))
        if found is not None:
            children.setdefault(int(found[1]), []).append(int(path.parent.name))
    members, waiting = {pid}, [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        members.update(new)
        waiting += new
    return members


def _resident_kib(pid: int) -> int | None:
    found = _PSS.search(_read(Path(f"/proc/{pid}/smaps_rollup")))
    return None if found is None else int(found[1])


def _read(path: Path) -> str:
    """Empty where the process has ended, or the system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
