"""What chooses tokens and finds log-probabilities."""

from __future__ import annotations

from manyhats.engine.backends.cuda.choosing.choose import Tiles
from manyhats.engine.backends.cuda.triton.choosing import choose, gather, weigh
from manyhats.engine.backends.cuda.triton.logprobs import logprobs
from manyhats.engine.backends.cuda.triton.survey import survey
from support.gpu.compiling import Entry

TILES = Tiles()
TYPES = {
    "logits": "*fp32",
    "changed": "*fp32",
    "wants": "*u8",
    "found": "*u8",
    "largest": "*fp32",
    "first": "*i32",
    "totals": "*fp32",
    "list_values": "*fp32",
    "list_ids": "*i32",
    "size": "i32",
    "counts": "*i32",
    "masses": "*i64",
    "max_rows": "i32",
    "num_parts": "i32",
}


def _entry(kernel: object, sm: int, **constants: int) -> Entry:
    return Entry(kernel, sm, TYPES, constants, num_warps=TILES.num_warps, enable_fp_fusion=False)


PARTS = {"PARTS": 32, "PART": TILES.part}
LISTED = {"LISTED": TILES.listed}
ENTRIES = [
    entry
    for sm in (80, 86, 89, 90)
    for entry in (
        _entry(survey, sm, PART=TILES.part, EDITS=TILES.edits),
        _entry(weigh, sm, **PARTS),
        _entry(gather, sm, **PARTS, **LISTED),
        _entry(choose, sm, **PARTS, **LISTED, TILE=TILES.tile),
        _entry(logprobs, sm, **PARTS),
    )
]
