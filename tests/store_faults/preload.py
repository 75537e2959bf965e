"""The shim ``faults.c``: compiled, preloaded into a new interpreter, and armed there."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

_SOURCE = Path(__file__).parent / "faults.c"
_PATH_VARIABLE = "MANYHATS_STORE_FAULTS"


class Action(IntEnum):
    """What happens at a call; the numbers are those of ``faults.c``."""

    COUNT = 0
    KILL = 1
    KILL_TORN = 2
    FAIL_ONCE = 3
    FAIL_FROM = 4


def run_preloaded(directory: Path, module: str, arguments: Sequence[str]) -> int:
    """Compile the shim into ``directory``, and run a module with it.

    Returns:
        Its exit status.

    Raises:
        FileNotFoundError: there is no C compiler.
        CalledProcessError: the shim does not compile.
    """
    library = directory / "faults.so"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(library), str(_SOURCE), "-ldl"], check=True)
    # One thread each: children are forked from a process that has computed nothing yet.
    environment = os.environ | {
        _PATH_VARIABLE: str(library),
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


class Shim:
    """The preloaded shim of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[_PATH_VARIABLE])
        self._library.faults_arm.argtypes = [
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_int,
        ]
        self._library.faults_arm.restype = None
        self._library.faults_disarm.restype = ctypes.c_long
        self._library.faults_trace.restype = ctypes.c_char_p

    def arm(
        self, directory: Path, action: Action, call: int = 0, *, with_reads: bool = False, error: int = 0
    ) -> None:
        """From now on, count I/O calls below ``directory``, and do harm at number ``call``, from 1.

        Args:
            directory: absolute, links resolved.
            action: the harm.
            call: which call.
            with_reads: whether calls that change nothing count, too.
            error: of a call that fails, its ``errno``.
        """
        self._library.faults_arm(os.fsencode(directory), action, call, with_reads, error)

    def disarm(self) -> str:
        """Stop; the counted calls, a letter each: w(rite), s(ync), o(pen to write), r(ename), … as in ``faults.c``."""
        count = self._library.faults_disarm()
        trace = str(self._library.faults_trace().decode()) if count else ""
        assert len(trace) == count, "the trace is full"
        return trace
