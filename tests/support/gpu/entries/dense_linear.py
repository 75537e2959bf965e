"""Products with weights in bfloat16 as they are launched: the smallest bucket of rows and the largest one.

With a K that no step divides, a head's shape, and the kernel that adds the sums of ranges.
"""

from __future__ import annotations

from manyhats.engine.backends.cuda.linears.tiles import tiles_for
from manyhats.engine.backends.cuda.triton.dense_linear import dense_linear
from manyhats.engine.backends.cuda.triton.reduce_splits import reduce_splits
from support.gpu.compiling import Entry

TYPES = {
    "x": "*bf16",
    "weight": "*bf16",
    "y": "*fp32",
    **dict.fromkeys(("M", "N", "STEPS", "X_STRIDE", "Y_STRIDE"), "i32"),
}


def linear(sm: int, bucket: int, shape: tuple[int, int] = (4096, 4096)) -> Entry:
    tiles = tiles_for(sm, *shape)
    tile = tiles.dense[bucket]
    return Entry(
        dense_linear,
        sm,
        TYPES,
        {
            "K": shape[1],
            "BK": tiles.block_k,
            "SPLITS": tiles.splits,
            "IS_SPLIT": tile.is_split and tiles.splits > 1,
            "RB": tile.rows,
            "BN": tile.weights,
            "bias": None,
        },
        mma="HGMMA" if sm == 90 else "HMMA",
        aligned=frozenset(("N", "X_STRIDE", "Y_STRIDE")),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


ENTRIES = [
    *(linear(sm, 16) for sm in (86, 89, 90)),
    linear(80, 16, (4096, 4100)),
    *(linear(sm, 256) for sm in (86, 90)),
    linear(90, 256, (128256, 4096)),
    Entry(
        reduce_splits,
        90,
        {"parts": "*fp32", "bias": "*fp32", "y": "*bf16", "M": "i32", "N": "i32", "Y_STRIDE": "i32"},
        {"SPLITS": 4, "B": 512},
        aligned=frozenset(("N", "Y_STRIDE")),
        enable_fp_fusion=False,
    ),
]
