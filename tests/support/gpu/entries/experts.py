"""Mixtures of experts of the shapes that models have: eight large ones, or a hundred small ones."""

from __future__ import annotations

from manyhats.engine.backends.cuda.linears.tiles import BLOCK, RowTiles, tiles_for
from manyhats.engine.backends.cuda.triton import expert_deltas, expert_linear, routing
from support.gpu.compiling import Entry

SIZES = dict.fromkeys(("N", "STEPS", "X_STRIDE", "Y_STRIDE"), "i32")
PAIRS = dict.fromkeys(("pairs", "tiles", "num_tiles"), "*i32")
PRODUCT = {"x": "*bf16", "table": "*i64", **PAIRS, **SIZES}
DELTAS = {
    **PAIRS,
    **dict.fromkeys(("rows", "slots"), "*i32"),
    **dict.fromkeys(("RECORD", "at", "K", "RANKS", "SIZE"), "i32"),
    "records": "*i64",
    "t": "*fp32",
}
ROUTING = {
    **PAIRS,
    **dict.fromkeys(("chosen", "rows", "num_rows"), "*i32"),
    **dict.fromkeys(("parts", "shares", "out", "y", "weight"), "*fp32"),
    **dict.fromkeys(("N", "K", "E", "D", "SPLIT"), "i32"),
    "x": "*bf16",
}
ALIGNED = frozenset(("X_STRIDE", "Y_STRIDE", "SIZE", "RANKS", "SPLIT", "D"))
MIXTRAL, QWEN = (28672, 4096), (1536, 2048)


def product(
    sm: int, shape: tuple[int, int], bucket: int, kind: str = "nested", result: str = "*bf16", top: int = 2
) -> Entry:
    is_dense, tiles = kind == "dense", tiles_for(sm, *shape)
    tile: RowTiles = (tiles.dense if is_dense else tiles.nf4)[bucket]
    constants = {"TOP": top, "K": shape[1], "BK": BLOCK, "RB": tile.rows, "BN": tile.weights}
    own = {} if is_dense else {"IS_NESTED": kind == "nested", "GATHERS": tile.gathers}
    return Entry(
        expert_linear.dense_experts if is_dense else expert_linear.nf4_experts,
        sm,
        {**PRODUCT, "y": result},
        {**constants, **own},
        mma="HGMMA" if sm == 90 else "HMMA",
        aligned=ALIGNED | {"N"},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


def deltas(sm: int) -> list[Entry]:
    cut = {"PARTS": 2, "TOP": 2, "MEMBER": 0, "BM": 16, "BR": 16}
    shrink = {**cut, "IS_OF_PAIRS": False, "BK": 128}
    return [
        Entry(expert_deltas.shrink_experts, sm, {**DELTAS, "x": "*bf16"}, shrink, "HMMA", ALIGNED | {"K"}),
        Entry(
            expert_deltas.expand_experts, sm, {**DELTAS, "y": "*bf16"}, {**cut, "BN": 128}, "HMMA", ALIGNED
        ),
    ]


def routes(sm: int) -> list[Entry]:
    of_experts = {"E": 128, "BE": 128, "TOP": 8}
    sort = {**of_experts, "GATHERS": True, "SIZE": 16, "BLOCK": 1024}
    return [
        Entry(routing.router, sm, ROUTING, {"BM": 16, "BE": 32, "BK": 32}, aligned=ALIGNED | {"K"}),
        Entry(routing.route, sm, ROUTING, {**of_experts, "SPLITS": 2, "RENORMALIZES": True}, num_warps=1),
        Entry(routing.sort_pairs, sm, ROUTING, sort),
        Entry(routing.combine, sm, ROUTING, {"TOP": 8, "BLOCK": 1024}, aligned=ALIGNED),
    ]


ENTRIES = [
    product(80, QWEN, 16),
    product(80, MIXTRAL, 128),
    product(86, MIXTRAL, 16),
    product(89, MIXTRAL, 128, result="*fp32", top=1),
    product(90, MIXTRAL, 16, "plain"),
    product(90, QWEN, 128),
    product(90, QWEN, 16, "dense"),
    *deltas(80),
    *deltas(90),
    *routes(80),
]
