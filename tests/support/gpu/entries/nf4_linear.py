"""Products with NF4 weights as they are launched: the smallest bucket of rows and the largest one on each GPU.

Each way to keep absmaxes, to look codes up and to end is there once.
"""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.backends.cuda.linears.tiles import RowTiles, tiles_for
from manyhats.engine.backends.cuda.triton.nf4_linear import nf4_dequantize, nf4_linear
from support.gpu.compiling import Entry

OF_ABSMAXES = {"nested": "*fp32", "nested_code": "*fp32", "first_block": "*i32", "row_offset": "*fp32"}
WEIGHTS = {"packed": "*u8", "absmax": "*u8", "code": "*fp32"}
SIZES = dict.fromkeys(("M", "N", "STEPS", "X_STRIDE", "Y_STRIDE"), "i32")
ALIGNED = frozenset(("N", "X_STRIDE", "Y_STRIDE"))


def linear(
    sm: int,
    bucket: int,
    shape: tuple[int, int] = (4096, 4096),
    *,
    is_plain: bool = False,
    types: dict[str, str] | None = None,
    tile: RowTiles | None = None,
) -> Entry:
    """Without a bias unless ``types`` have one; the result is float32 unless they say."""
    tiles = tiles_for(sm, *shape)
    tile = tile or tiles.nf4[bucket]
    is_split = tile.is_split and tiles.splits > 1
    absent = {"bias": None} | (dict.fromkeys(OF_ABSMAXES) if is_plain else {})
    given = {"x": "*bf16", **WEIGHTS, **OF_ABSMAXES, "y": "*fp32", **SIZES, **(types or {})}
    if is_plain:
        given |= {"absmax": "*fp32"}
    constants = {
        "K": shape[1],
        "BK": tiles.block_k,
        "SPLITS": tiles.splits,
        "IS_SPLIT": is_split,
        "RB": tile.rows,
        "BN": tile.weights,
        "GATHERS": tile.gathers,
    }
    return Entry(
        nf4_linear,
        sm,
        {name: kind for name, kind in given.items() if name not in absent or name in (types or {})},
        constants | {name: None for name in absent if name not in (types or {})},
        mma="HGMMA" if sm == 90 else "HMMA",
        aligned=ALIGNED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


def dequantize(sm: int) -> Entry:
    types = {**WEIGHTS, **OF_ABSMAXES, "weight": "*bf16", "N": "i32"}
    constants = {"K": 4096, "BN": 128}
    return Entry(
        nf4_dequantize, sm, types, constants, aligned=frozenset("N"), num_stages=1, enable_fp_fusion=False
    )


FEW = tiles_for(90, 4096, 4096).nf4[16]

ENTRIES = [
    *(linear(sm, 16) for sm in (80, 86, 90)),
    linear(89, 16, is_plain=True),
    *(linear(sm, 256) for sm in (80, 90)),
    linear(86, 256, (28672, 4096), types={"bias": "*fp32", "y": "*bf16"}),
    linear(89, 128),
    linear(90, 16, tile=replace(FEW, num_stages=1, gathers=False)),
    dequantize(90),
]
