"""The launch of attention on CUDA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhats.engine.backends.cuda.attention.work import Tiling
from manyhats.engine.backends.cuda.triton import attention as kernels
from manyhats.engine.model.architecture import Attention

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
"""How ``attend`` is compiled: a block's number is loaded two tiles ahead, keys and values one."""


@dataclass(frozen=True, slots=True, eq=False)
class WorkOnDevice:
    """``Work`` on the device, where more room may follow what there is.

    Attributes:
        items: [W, 8] int32. num_items: [1] int32.
        merges: [R, 4] int32. num_merges: [1] int32.
    """

    items: Tensor
    num_items: Tensor
    merges: Tensor
    num_merges: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Room for the splits that are items of their own, ``4 · H · (K + 2)`` bytes each.

    Attributes:
        totals: [slots, H, K] float32.
        stats: [slots, H, 2] float32.
    """

    totals: Tensor
    stats: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGates:
    """What the keys and values of sequences' KV prefixes are multiplied with, in one layer.

    Attributes:
        factors: [B, 2] float32, of keys and of values; 1 where there is no gate.
        query_start: [B + 1] int32, each sequence's first row; its others come before, as those of encoders do.
    """

    factors: Tensor
    query_start: Tensor


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    work: WorkOnDevice,
    parts: Parts,
    out: Tensor,
    attention: Attention,
    tiling: Tiling,
    num_lanes: int,
    gates: PrefixGates | None = None,
) -> None:
    """Launches ``softmax(cap(scale · q Kᵀ)) V`` of all rows of a step.

    Args:
        queries: [N, H, K] bfloat16; rows may be apart.
        keys: [blocks, block, Hkv, K] bfloat16, of one layer; this step's are there.
        values: the same.
        tables: [B, longest] int32.
        work: of the step, for this window.
        parts: written and read.
        out: [N, H, K] bfloat16 or float32.
        attention: the layer's.
        tiling: of the model.
        num_lanes: programs that walk the items; ``num_lanes · head_tiles`` programs run.
        gates: None for none.
    """
    log2_e, cap = math.log2(math.e), attention.softcap
    scale = attention.scale * log2_e
    kernels.attend[(num_lanes, tiling.head_tiles)](
        queries,
        keys,
        values,
        tables,
        work.items,
        work.num_items,
        parts.totals,
        parts.stats,
        out,
        work.items if gates is None else gates.factors,
        work.items if gates is None else gates.query_start,
        scale if cap is None else 2 * scale / cap,
        1.0 if cap is None else cap * log2_e,
        queries.stride(0),
        tables.stride(0),
        **constants_of(attention, tiling, keys.shape[1], has_gates=gates is not None),
        **OPTIONS,
    )
    kernels.combine[(num_lanes, attention.num_heads)](
        parts.totals,
        parts.stats,
        out,
        work.merges,
        work.num_merges,
        HQ=attention.num_heads,
        D=attention.head_dim,
        BD=tiling.head_size,
        num_warps=1,
        enable_fp_fusion=False,
    )


def constants_of(
    attention: Attention, tiling: Tiling, block_size: int, *, has_gates: bool = False
) -> dict[str, int | bool]:
    """The constants that the kernel ``attend`` is compiled for."""
    return {
        "HQ": attention.num_heads,
        "HKV": attention.num_kv_heads,
        "D": attention.head_dim,
        "BLOCK": block_size,
        "HEADS": tiling.num_heads,
        "BM": tiling.size,
        "BD": tiling.head_size,
        "TILE": tiling.tile,
        "SPLIT": tiling.split,
        "WINDOW": attention.window or 0,
        "SEES_ALL": attention.sees_all,
        "HAS_CAP": attention.softcap is not None,
        "HAS_GATES": has_gates,
    }
