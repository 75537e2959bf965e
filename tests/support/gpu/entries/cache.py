"""Copies of blocks."""

from __future__ import annotations

from manyhats.engine.backends.cuda.triton.cache import copy_blocks
from support.gpu.compiling import Entry

TYPES = {
    **dict.fromkeys(("keys", "values"), "*bf16"),
    **dict.fromkeys(("copies", "count"), "*i32"),
    "LAYER_STRIDE": "i32",
}

ENTRIES = [
    Entry(
        copy_blocks,
        sm,
        TYPES,
        {"SIZE": 16 * 8 * 128, "CHUNK": 2048},
        aligned=frozenset(("LAYER_STRIDE",)),
        enable_fp_fusion=False,
    )
    for sm in (80,)
]
