"""Part H: memory accesses and races of attention and deltas, by compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.record import Recorder
from benchmarks.gpu.scale import Scale

_TOOLS = ("memcheck", "racecheck")
_TOLD = 600
"""The last characters of what the tool says."""


def run(out: Recorder, scale: Scale) -> None:
    """A process for each tool, which compiles nothing that others have not."""
    if not scale.is_gpu:
        out.lacks("all of it: compute-sanitizer needs a GPU")
        return
    program = _program()
    if program is None:
        out.lacks("all of it: compute-sanitizer is not installed (it is part of the CUDA toolkit)")
        return
    # Without the tool first: the kernels are then compiled.
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(_command(), capture_output=True, check=False, timeout=out.left_s)
    for tool in _TOOLS:
        if out.is_late:
            return
        _watch(out, program, tool)


def _program() -> str | None:
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def _command() -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.sanitized"]


def _watch(out: Recorder, program: str, tool: str) -> None:
    began_s = time.perf_counter()
    command = [program, "--tool", tool, "--error-exitcode", "86", *_command()]
    left_s = out.left_s
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left_s)
    except subprocess.TimeoutExpired:
        out.lacks(f"{tool}: not done after {left_s:.0f} s")
        return
    seconds, said = time.perf_counter() - began_s, (done.stdout + done.stderr)[-_TOLD:]
    if done.returncode not in (0, 86):
        out.lacks(f"{tool}, which ended with {done.returncode}: {said}")
        return
    out.record("sanitizer", tool=tool, is_clean=done.returncode == 0, seconds=seconds, said=said)
