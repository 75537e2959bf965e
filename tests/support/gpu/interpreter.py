"""Where CUDA's kernels run in tests: in Triton's interpreter on the CPU, or on a GPU with ``MANYHATS_DEVICE=cuda``.

Import it before kernels: ``@triton.jit`` asks for the interpreter once, when a module is imported.
"""

from __future__ import annotations

import os

import pytest
from benchmarks.gpu.interpreter import repair

DEVICE = os.environ.get("MANYHATS_DEVICE", "cpu")

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton.language", reason="Triton has no wheel for this machine")

if DEVICE == "cpu":
    repair()
