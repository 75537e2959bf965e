"""Deltas of several adapters at one place, combined into one adapter's if the result does not depend on their order.

=============================  ======================================================================
``LowRank``                    summed: matrices side by side along the rank
``Affine``, an offset alone    summed; it goes with low-rank deltas, of which it is the bias
``EmbeddingLowRank``           summed, as ``LowRank``
``Affine``, a scale alone      multiplied, as PEFT does for several active IA3 adapters
``InputScale``                 multiplied, likewise
``EmbeddingRows``              joined, if no token gets two rows
``HeadRows``                   joined, likewise
=============================  ======================================================================

Any other pair depends on an order that nothing defines. A low-rank delta beside a rescaling is one: PEFT never has
IA3 and LoRA active on one linear, so nothing says whether the delta reads the rescaled input, or is itself rescaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from manyhats.adapters.primitives import (
    Affine,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    InputScale,
    LowRank,
)

D = TypeVar("D", bound=Delta)


class NotCombinableError(Exception):
    """The deltas cannot be one adapter's; the message says why, as the end of a sentence."""


def combine_deltas(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """Combine the deltas of one place. Sums are taken in the order given; in exact arithmetic it would not matter.

    Args:
        deltas: of one site, or all of the embedding's or the head's; at least one.

    Raises:
        NotCombinableError: some depend on an order.
    """
    if any(getattr(delta, "gate", None) is not None for delta in deltas):
        raise NotCombinableError("a gate is one delta's, and would scale all of them")
    for combine in (
        _add_low_ranks,
        _add_embedding_low_ranks,
        _multiply_outputs,
        _multiply_inputs,
        _join_rows,
    ):
        combined = combine(deltas)
        if combined:
            return combined
    raise NotCombinableError(_why_not(deltas))


def _why_not(deltas: Sequence[Delta]) -> str:
    low_ranks = len(_only(LowRank, deltas))
    rescalings = len(_only(InputScale, deltas)) + sum(d.scale is not None for d in _only(Affine, deltas))
    if low_ranks and rescalings:
        return "no training library defines whether a low-rank delta is rescaled too, or reads the rescaled input"
    return "nothing says which comes first"


def _only(kind: type[D], deltas: Sequence[Delta]) -> list[D]:
    return [delta for delta in deltas if isinstance(delta, kind)]


def _add_low_ranks(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    low_ranks = _only(LowRank, deltas)
    offsets = [d.offset for d in _only(Affine, deltas) if d.scale is None and d.offset is not None]
    if len(low_ranks) + len(offsets) < len(deltas):
        return ()
    combined: list[Delta] = []
    if low_ranks:
        scale, ratios = _common_scale([delta.scale for delta in low_ranks])
        a = _side_by_side([delta.a for delta in low_ranks], dim=0)
        b = _side_by_side(_times([delta.b for delta in low_ranks], ratios), dim=1)
        combined.append(LowRank(low_ranks[0].site, a, b, scale))
    if offsets:
        site = _only(Affine, deltas)[0].site
        combined.append(Affine(site, scale=None, offset=torch.stack(_floats(offsets)).sum(0)))
    return tuple(combined)


def _add_embedding_low_ranks(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    low_ranks = _only(EmbeddingLowRank, deltas)
    if len(low_ranks) < len(deltas):
        return ()
    scale, ratios = _common_scale([delta.scale for delta in low_ranks])
    a = _side_by_side([delta.a for delta in low_ranks], dim=1)
    b = _side_by_side(_times([delta.b for delta in low_ranks], ratios), dim=1)
    return (EmbeddingLowRank(a, b, scale),)


def _multiply_outputs(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    affines = _only(Affine, deltas)
    scales = [delta.scale for delta in affines if delta.scale is not None and delta.offset is None]
    if len(scales) < len(deltas):
        return ()
    return (Affine(affines[0].site, scale=torch.stack(_floats(scales)).prod(0), offset=None),)


def _multiply_inputs(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    inputs = _only(InputScale, deltas)
    if len(inputs) < len(deltas):
        return ()
    return (InputScale(inputs[0].site, torch.stack(_floats([delta.scale for delta in inputs])).prod(0)),)


def _join_rows(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    embedding, head = _only(EmbeddingRows, deltas), _only(HeadRows, deltas)
    if len(embedding) == len(deltas):
        return (EmbeddingRows(_join_ids(embedding), _side_by_side([d.rows for d in embedding], dim=0)),)
    if len(head) == len(deltas):
        return (HeadRows(_join_ids(head), _side_by_side([d.rows for d in head], dim=0)),)
    return ()


def _join_ids(deltas: Sequence[EmbeddingRows] | Sequence[HeadRows]) -> Tensor:
    ids = torch.cat([delta.ids for delta in deltas])
    if len(ids.unique()) < len(ids):
        raise NotCombinableError("both replace the row of the same token")
    return ids


def _common_scale(scales: Sequence[float]) -> tuple[float, list[float]]:
    """The scale of largest magnitude, and each one as a multiple of it; no multiple exceeds 1 in magnitude."""
    largest = max(scales, key=abs)
    return largest, [scale / largest if largest else 1.0 for scale in scales]


def _times(matrices: Sequence[Tensor], ratios: Sequence[float]) -> list[Tensor]:
    """Each matrix times its ratio, in float32 so that nothing is rounded to a stored half-precision dtype."""
    return [m if ratio == 1 else m.float() * ratio for m, ratio in zip(matrices, ratios, strict=True)]


def _side_by_side(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenated; matrices of different dtypes in float32, which holds each of them exactly."""
    is_one_dtype = len({matrix.dtype for matrix in matrices}) == 1
    return torch.cat(list(matrices) if is_one_dtype else _floats(matrices), dim=dim)


def _floats(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]
