"""A sample of ``make test-store-faults``: kill -9 and disk errors at I/O calls of the whole store."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_the_store_survives_a_sample_of_failpoints() -> None:
    sample = ["--every", "9", "--only", "register, next version", "--only", "delete a task"]
    done = subprocess.run(
        [sys.executable, "-m", "store_faults", *sample],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = re.search(r"^(\d+) failpoints tried, (\d+) survived$", done.stdout, re.MULTILINE)
    assert total is not None
    assert total[1] == total[2]
    assert int(total[1]) >= 20
