"""Queries and keys on CUDA, normed and rotated, and the way of keys and values into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton

from manyhats.engine.backends.cuda.triton import rotary as kernels
from manyhats.engine.model.architecture import Attention, Norm

if TYPE_CHECKING:
    from torch import Tensor

    from manyhats.engine.model.rotary import Angles
    from manyhats.engine.model.weights import NormWeight


def rotate_and_store(
    qkv: Tensor,
    attention: Attention,
    table: Angles,
    positions: Tensor,
    cells: Tensor,
    query_weight: NormWeight | None,
    key_weight: NormWeight | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Launches the norms and rotations of a layer's queries and keys, and writes keys and values to their cells.

    Args:
        qkv: [N, (H + 2 · Hkv) · K] float32 or bfloat16; rows may be apart.
        attention: the layer's.
        table: cosines and sines of its kind of rotation, [positions, rotary_dim / 2] float32, on the device.
        positions: [N] int32.
        cells: [N] int64 or int32, block · block_size + offset.
        query_weight: of the norm of queries, on the device; None if there is none.
        key_weight: likewise.
        queries: [N, H, K] bfloat16, written; no part of qkv.
        keys: [blocks, block, Hkv, K] bfloat16, of one layer.
        values: the same.
    """
    cos, sin = table
    kernels.rotate_and_store[(qkv.shape[0], attention.num_heads + 2 * attention.num_kv_heads)](
        qkv,
        cos,
        sin,
        positions,
        cells,
        *_tensors_of(query_weight, cos),
        *_tensors_of(key_weight, cos),
        queries,
        keys,
        values,
        qkv.stride(0),
        _eps_of(attention.query_norm),
        _eps_of(attention.key_norm),
        **constants_of(attention),
        num_warps=1,
        enable_fp_fusion=False,
    )


def constants_of(attention: Attention) -> dict[str, Any]:
    """The constants that the kernel is compiled for."""
    half, size = attention.rotary_dim // 2, attention.head_dim
    return {
        "HQ": attention.num_heads,
        "HKV": attention.num_kv_heads,
        "D": size,
        "BD": triton.next_power_of_2(size),
        "HALF": half,
        "BH": triton.next_power_of_2(max(half, 1)),
        "BR": triton.next_power_of_2(max(size - 2 * half, 1)),
        **_norm_constants("QUERY", attention.query_norm),
        **_norm_constants("KEY", attention.key_norm),
    }


def _norm_constants(prefix: str, norm: Norm | None) -> dict[str, Any]:
    return {
        f"{prefix}_NORM": "" if norm is None else norm.kind,
        f"{prefix}_SPAN": "head" if norm is None else norm.span,
        f"{prefix}_HAS_BIAS": norm is not None and norm.has_bias,
    }


def _tensors_of(weight: NormWeight | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias, or a pointer that is not read."""
    if weight is None:
        return unread, unread
    return weight.weight, unread if weight.bias is None else weight.bias


def _eps_of(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps
