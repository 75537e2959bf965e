"""Kernels are imported after the interpreter's settings."""

import support.gpu.interpreter  # noqa: F401
