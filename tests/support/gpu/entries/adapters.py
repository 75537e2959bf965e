"""What adapters do in an 8B model; kernels without tensor cores for the least card alone."""

from __future__ import annotations

from manyhats.engine.backends.cuda.record import StreamNorm
from manyhats.engine.backends.cuda.triton import bottleneck, deltas, ends, gates, scaling
from support.gpu.compiling import Entry

RECORDS = {"records": "*i64", "RECORD": "i32", "at": "i32"}
SEGMENTS = {**RECORDS, "rows": "*i32", "segments": "*i32", "num_segments": "*i32"}
ROWS = {**RECORDS, "rows": "*i32", "slots": "*i32", "num_rows": "*i32", "D": "i32"}
INSIDE = {"t": "*fp32", "T_ROWS": "i32", "RANKS": "i32"}

TEXTS = {"gates": "*fp32", "within": "*i32"}

SHRINK = {**SEGMENTS, **INSIDE, "x": "*bf16", "K": "i32", "SPLIT": "i32"}
EXPAND = {
    **SEGMENTS,
    **INSIDE,
    "gates": "*fp32",
    "Y_STRIDE": "i32",
    "SIZE0": "i32",
    "SIZE1": "i32",
    "SIZE2": "i32",
}
WIDEN = {**SEGMENTS, **INSIDE, **TEXTS, "f": "*fp32", "D": "i32", "SIZES": "i32"}
LOGITS = {**SEGMENTS, "x": "*bf16", "y": "*fp32", "K": "i32", "Y_STRIDE": "i32"}
SUBLAYER = {**ROWS, **TEXTS, "r": "*fp32", "m": "*fp32", "eps": "fp32"}
NORMED = {**SUBLAYER, "weight": "*fp32", "bias": "*fp32"}
GATES = {**ROWS, "STEP": "i32", "prefix": "i32", "gates": "*fp32"}
CLOSED = {**RECORDS, "STEP": "i32", "prefix": "i32", "texts": "*i32", "num_texts": "*i32"}
SCALED = {**ROWS, "first": "i32", "x": "*bf16", "scaled": "*bf16", "K": "i32"}
PUT = {**ROWS, "first": "i32", **dict.fromkeys(("Y_STRIDE", "START", "SIZE"), "i32")}
EMBEDDING = {**ROWS, "token_ids": "*i32", "hidden": "*fp32", "multiplier": "fp32"}

ALIGNED = frozenset(("K", "SPLIT", "RANKS", "SIZES", "D", "Y_STRIDE", "SIZE0", "SIZE1", "SIZE2"))
LAYER_NORM = {"NORM": int(StreamNorm.LAYER), "HAS_BIAS": True, "BLOCK": 1024}
NO_NORM = {"NORM": int(StreamNorm.NONE), "HAS_BIAS": False, "BLOCK": 1024, "weight": None, "bias": None}
THREE = {"PARTS": 3, "SPLITS": 4, "BM": 16, "BR": 16}
ONE = {"PARTS": 1, "SPLITS": 8, "BM": 16, "BR": 16}


UNFUSED = (deltas.expand, bottleneck.read, bottleneck.widen, bottleneck.leave, bottleneck.skip_norm)


def dots(sm: int) -> list[Entry]:
    kernels = [
        (deltas.shrink, SHRINK, {**THREE, "GATHERS": True, "BK": 128}),
        (deltas.expand, {**EXPAND, "y": "*bf16"}, {**THREE, "GATES": 5 * (sm in (80, 90)), "BN": 128}),
        (bottleneck.widen, WIDEN, {**OF_TEXTS, "SPLITS": 4, "BM": 16, "BN": 128, "BR": 16}),
        (ends.own_logits, LOGITS, {"BM": 16, "BN": 64, "BK": 128}),
    ]
    if sm in (80, 90):
        kernels.append((deltas.expand, {**EXPAND, "y": "*fp32"}, {**ONE, "GATES": 0, "BN": 128}))
    return [
        Entry(
            kernel,
            sm,
            types,
            constants,
            mma="HMMA",
            aligned=ALIGNED,
            enable_fp_fusion=kernel not in UNFUSED,
        )
        for kernel, types, constants in kernels
    ]


OF_TEXTS = {"HAS_GATES": True, "HAS_ENDS": True}
NO_GATES, NO_ENDS = {"HAS_GATES": False}, {"HAS_ENDS": False}


def others(sm: int) -> list[Entry]:
    kernels = (
        (deltas.scale_inputs, {**SEGMENTS, "x": "*bf16", "K": "i32"}, {"BM": 16, "BK": 512}),
        (bottleneck.read, {**SUBLAYER, "x": "*bf16"}, {**NO_NORM, **NO_GATES}),
        (bottleneck.read, {**NORMED, "x": "*bf16"}, {**LAYER_NORM, "HAS_GATES": True}),
        (bottleneck.leave, {**SUBLAYER, "f": "*fp32"}, {**NO_NORM, **NO_ENDS}),
        (bottleneck.leave, {**NORMED, "f": "*fp32"}, {**LAYER_NORM, "HAS_ENDS": True}),
        (bottleneck.skip_norm, {**SUBLAYER, "stream": "*fp32"}, {"HAS_ENDS": True, "BLOCK": 1024}),
        (gates.open_gates, {**GATES, "x": "*bf16", "K": "i32"}, {"MEMBERS": 3, "BLOCK": 512}),
        (gates.close_gates, {**GATES, **CLOSED, "factors": "*fp32"}, {"MEMBERS": 3, "BLOCK": 128}),
        (scaling.scaled_input, SCALED, {"BLOCK": 512}),
        (scaling.put_outputs, {**PUT, "found": "*bf16", "y": "*bf16"}, {"BLOCK": 512}),
        (ends.change_embedding, EMBEDDING, {"BLOCK": 512}),
    )
    return [
        Entry(kernel, sm, types, constants, aligned=ALIGNED, enable_fp_fusion=kernel not in UNFUSED)
        for kernel, types, constants in kernels
    ]


ENTRIES = [*(entry for sm in (80, 86, 89, 90) for entry in dots(sm)), *others(80)]
