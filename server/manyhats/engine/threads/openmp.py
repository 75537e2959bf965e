"""How long the threads of a parallel loop spin before they sleep."""

from __future__ import annotations

import os

_SPIN_COUNT = "GOMP_SPINCOUNT"
_WAIT_POLICY = "OMP_WAIT_POLICY"
_TURNS = 500
"""About a microsecond per hundred; the gaps between a step's loops are a few microseconds."""


def sleep_soon() -> None:
    """Make waiting OpenMP threads spin for microseconds, not milliseconds; call it before torch is imported.

    By default libgomp's threads spin for some milliseconds before they sleep. Beside other busy processes the thread
    they wait for is often not running at all, and the spinning keeps it from running: decoding becomes ten times
    slower. What a user has set in the environment stays.
    """
    if _WAIT_POLICY not in os.environ:
        os.environ.setdefault(_SPIN_COUNT, str(_TURNS))
