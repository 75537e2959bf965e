"""``make fuzz``: every target in a process of its own, one after another; fails if any does.

FUZZ_SECONDS (600 in all by default) is shared out evenly. An input that fails is printed, and kept in FUZZ_KEEP if
that names a directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzzing.targets import targets

_ENDS = ("crash-", "timeout-", "oom-", "leak-", "slow-unit-")


def main() -> int:
    """Fuzz everything, print a line for each target, and return the exit code."""
    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    names = list(targets())
    failed = [name for name in names if not _run(name, max(1, seconds // len(names)))]
    print(f"failed: {', '.join(failed)}" if failed else "no crash, no hang, no excess of memory")
    return 1 if failed else 0


def _run(name: str, seconds: int) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "fuzzing.worker", name, directory, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        inputs = [path for path in Path(directory).iterdir() if path.name.startswith(_ENDS)]
        is_good = done.returncode == 0 and not inputs
        print(_line(name, seconds, done.stderr, is_good), flush=True)
        if not is_good:
            _report(inputs, done.stdout + done.stderr)
        return is_good


def _line(name: str, seconds: int, log: str, is_good: bool) -> str:
    found = dict(re.findall(r"stat::(\w+):\s+(\d+)", log))
    executions, rate = found.get("number_of_executed_units", "?"), found.get("average_exec_per_sec", "?")
    peak = found.get("peak_rss_mb", "?")
    coverage = re.findall(r"ft: (\d+) corp: (\d+)", log)
    features, corpus = coverage[-1] if coverage else ("?", "?")
    return (
        f"{name:12} {seconds:5d} s {executions:>10} inputs {rate:>7}/s {features:>6} features"
        f" {corpus:>5} kept, peak {peak} MB: {'good' if is_good else 'FAILED'}"
    )


def _report(inputs: list[Path], log: str) -> None:
    print(log[-4000:])
    for path in inputs:
        print(f"{path.name}: {path.read_bytes()!r}")
        if keep := os.environ.get("FUZZ_KEEP"):
            shutil.copy(path, keep)


if __name__ == "__main__":
    sys.exit(main())
