"""Activations, each in one kernel or another, and the scaling of logits."""

from __future__ import annotations

from manyhats.engine.backends.cuda.triton.activations import activate, scale_logits
from support.gpu.compiling import Entry


def entry(sm: int, name: str, *, is_gated: bool) -> Entry:
    return Entry(
        activate,
        sm,
        {"x": "*bf16", "y": "*bf16", "X_STRIDE": "i32", "SIZE": "i32"},
        {"NAME": name, "IS_GATED": is_gated, "BLOCK": 1024},
        aligned=frozenset(("X_STRIDE", "SIZE")),
        enable_fp_fusion=False,
    )


ENTRIES = [
    entry(80, "silu", is_gated=True),
    entry(86, "gelu_pytorch_tanh", is_gated=True),
    entry(89, "gelu", is_gated=True),
    entry(90, "sqrtsoftplus", is_gated=False),
    Entry(
        scale_logits,
        90,
        {"x": "*fp32", "STRIDE": "i32", "SIZE": "i32", "DIVISOR": "fp32", "CAP": "fp32"},
        {"HAS_CAP": True, "BLOCK": 1024},
        aligned=frozenset(("STRIDE", "SIZE")),
        enable_fp_fusion=False,
    ),
]
