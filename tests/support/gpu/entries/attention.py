"""Attention of the shapes that models have, and the sum of its parts."""

from __future__ import annotations

from manyhats.engine.backends.cuda.attention.attend import OPTIONS, constants_of
from manyhats.engine.backends.cuda.attention.work import Tiling
from manyhats.engine.backends.cuda.triton.attention import attend, combine
from manyhats.engine.model.architecture import Attention
from support.gpu.compiling import Entry

TYPES = {
    **dict.fromkeys(("queries", "keys", "values", "out"), "*bf16"),
    **dict.fromkeys(("tables", "items", "count", "query_start"), "*i32"),
    **dict.fromkeys(("part", "stats", "gates"), "*fp32"),
    **dict.fromkeys(("SCALE", "CAP"), "fp32"),
    **dict.fromkeys(("QUERY_STRIDE", "TABLE_STRIDE"), "i32"),
}
LLAMA = Attention(num_heads=32, num_kv_heads=8, head_dim=128, scale=128**-0.5)
GEMMA = Attention(num_heads=8, num_kv_heads=4, head_dim=256, scale=1 / 16, window=4096, softcap=50.0)
PHI = Attention(num_heads=32, num_kv_heads=32, head_dim=80, scale=80**-0.5)
FALCON = Attention(num_heads=71, num_kv_heads=1, head_dim=64, scale=1 / 8)
ENCODER = Attention(num_heads=12, num_kv_heads=12, head_dim=64, scale=1 / 8, window=65, sees_all=True)


def entry(attention: Attention, sm: int, *, has_gates: bool = False) -> Entry:
    constants = constants_of(attention, Tiling.of(attention), 16, has_gates=has_gates)
    return Entry(
        attend,
        sm,
        TYPES,
        constants,
        mma="HMMA",
        aligned=frozenset(("QUERY_STRIDE",)),
        **OPTIONS,
    )


ENTRIES = [
    *(entry(LLAMA, sm) for sm in (80, 90)),
    entry(GEMMA, 86),
    entry(PHI, 89),
    entry(FALCON, 80),
    entry(ENCODER, 90, has_gates=True),
    Entry(
        combine,
        86,
        {**dict.fromkeys(("part", "stats"), "*fp32"), "out": "*bf16", "merges": "*i32", "count": "*i32"},
        {"HQ": 32, "D": 128, "BD": 128},
        num_warps=1,
        enable_fp_fusion=False,
    ),
]
