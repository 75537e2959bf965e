"""What most parts need, imported once; their processes begin as copies of one that has it. No GPU is touched."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress

import torch  # noqa: F401

if os.environ.get("TRITON_INTERPRET") == "1":
    from benchmarks.gpu.interpreter import repair

    repair()
    # Elsewhere their import may touch the GPU, which a copy of this process could not use any more.
    for package in ("bitsandbytes", "transformers", "peft"):
        with suppress(ImportError):
            importlib.import_module(package)

import manyhats.engine.backends.torch.backend  # noqa: F401
