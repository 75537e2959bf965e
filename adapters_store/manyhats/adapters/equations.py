"""What the primitives do, in plain, differentiable torch: one equation each, as ``primitives`` states it.

The torch backend and the trainer run these; kernels are tested against them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    EmbeddingLowRank,
    EmbeddingRows,
    LayerNorm,
)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``scale · (x Aᵀ) Bᵀ``, added to a linear's output; see ``LowRank``.

    Args:
        x: [..., d_in], the linear's input.
        a: [R, d_in], dtype of x.
        b: [d_out, R], dtype of x.
        scale: dimensionless; with the rows' gate, if there is one.

    Returns:
        [..., d_out], dtype of x.
    """
    return ((x @ a.T) @ b.T) * scale


def affine(y: Tensor, delta: Affine, gate: float | Tensor = 1.0) -> Tensor:
    """``y · g · scale + offset`` for a linear's output [..., d_out]; see ``Affine``."""
    if delta.gate is not None:
        y = y * gate
    if delta.scale is not None:
        y = y * delta.scale.float()
    if delta.offset is not None:
        y = y + delta.offset.float()
    return y


def bottleneck_input(
    delta: Bottleneck, r: Tensor, m: Tensor, norm: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """What a bottleneck and its gate read; the arguments are those of ``bottleneck``."""
    return _sources(r, m, norm)[delta.input]


def _sources(r: Tensor, m: Tensor, norm: Callable[[Tensor], Tensor] | None) -> dict[BottleneckInput, Tensor]:
    sources = {BottleneckInput.OUTPUT: m, BottleneckInput.SUM: r + m, BottleneckInput.RESIDUAL: r}
    return sources if norm is None else {**sources, BottleneckInput.NORMED: norm(r + m)}


def bottleneck(
    delta: Bottleneck,
    r: Tensor,
    m: Tensor,
    norm: Callable[[Tensor], Tensor] | None = None,
    gate: float | Tensor = 1.0,
    mask: float | Tensor = 1.0,
) -> Tensor:
    """``m' = keep · m + carry · r + carry_normed · N(r + m) + (f, or norm_after(f + norm_residual))``.

    See ``Bottleneck``.

    Args:
        delta: one sub-layer's.
        r: [..., D]; the residual stream that enters the sub-layer.
        m: [..., D]; the sub-layer's output, which is added to the stream without the adapter.
        norm: N, of the stream behind the sub-layer; None if the base has none.
        gate: g, of the rows' text.
        mask: [..., b], 1 for what a row has of the bottleneck, else 0.

    Returns:
        [..., D]: what is added to the stream instead of m.
    """
    sources = _sources(r, m, norm)
    x = sources[delta.input]
    if delta.norm_before is not None:
        x = layer_norm(x, delta.norm_before)
    hidden = mask * ACTIVATIONS[delta.activation](functional.linear(x, delta.down, delta.down_bias))
    f = gate * delta.scale * functional.linear(hidden, delta.up, delta.up_bias)
    if delta.norm_after is not None:
        f = f if delta.norm_residual is None else f + sources[delta.norm_residual]
        f = layer_norm(f, delta.norm_after)
    changed = delta.keep * m + delta.carry * r + f
    return changed + delta.carry_normed * sources[BottleneckInput.NORMED] if delta.carry_normed else changed


def embedding(delta: EmbeddingLowRank | EmbeddingRows, token_ids: Tensor, embedded: Tensor) -> Tensor:
    """Embeddings as an adapter changes them, before any multiplier; see ``EmbeddingLowRank`` and ``EmbeddingRows``.

    Args:
        delta: one of the adapter's.
        token_ids: [N] int64.
        embedded: [N, D] float32, without the delta.

    Returns:
        [N, D].
    """
    if isinstance(delta, EmbeddingLowRank):
        a = delta.a.index_select(0, token_ids).float()
        return embedded + (a @ delta.b.float().T) * delta.scale
    row = _row_numbers(delta.ids.to(token_ids.device), token_ids)
    own = delta.rows.index_select(0, row.clamp(min=0)).float()
    return torch.where((row >= 0).unsqueeze(1), own, embedded)


def _row_numbers(ids: Tensor, token_ids: Tensor) -> Tensor:
    """The index of each token in ``ids``, −1 if absent: [N] int64; nothing is read to the host."""
    ordered, order = ids.sort()
    place = torch.searchsorted(ordered, token_ids).clamp(max=ids.numel() - 1)
    return torch.where(ordered.index_select(0, place) == token_ids, order.index_select(0, place), -1)


def layer_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    """The norm of each row of x, [..., D]; see ``LayerNorm``."""
    return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
