"""An adapter's primitives by the place where they act, and their effect there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.methods.bottleneck import bottleneck_output
from manyhats.adapters.methods.lora import lora_delta
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    LoweredAdapter,
    LowRank,
)
from manyhats.adapters.sites import Site
from manyhats.engine.model.architecture import SUBLAYERS
from manyhats.trainer.errors import BaseError
from manyhats.trainer.model.linear import FrozenLinears, LowRankTerm, adapted_product, frozen_product

HEAD = Site(-1, "lm_head")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LinearDeltas:
    """What acts at one linear."""

    input_scales: Sequence[InputScale] = ()
    affines: Sequence[Affine] = ()
    low_ranks: Sequence[LowRank] = ()


@dataclass(frozen=True, slots=True)
class PlacedDeltas:
    """All deltas of one adapter.

    Attributes:
        linears: of layers, by site.
        bottlenecks: by sub-layer.
        embedding: in their order.
        head: in their order.
    """

    linears: Mapping[Site, LinearDeltas] = field(default_factory=dict)
    bottlenecks: Mapping[Site, Sequence[Bottleneck]] = field(default_factory=dict)
    embedding: Sequence[EmbeddingLowRank | EmbeddingRows] = ()
    head: Sequence[LowRank | HeadRows | HeadWeight] = ()

    def at(self, layer: int, names: Sequence[str]) -> list[LinearDeltas]:
        """The deltas of some linears of a layer."""
        return [self.linears.get(Site(layer, name), _NONE) for name in names]


_NONE = LinearDeltas()


def place_deltas(adapter: LoweredAdapter | None, sites: Set[Site]) -> PlacedDeltas:
    """Sort an adapter's deltas by place.

    Args:
        adapter: None for none.
        sites: of the decoder.

    Raises:
        BaseError: one acts where this decoder has no such place.
    """
    if adapter is None:
        return PlacedDeltas()
    by_site: dict[Site, list[Delta]] = defaultdict(list)
    for delta in adapter.deltas:
        by_site[_site(delta)].append(delta)
    linears, bottlenecks = {}, {}
    for site, deltas in by_site.items():
        if site in (HEAD, _EMBEDDING):
            continue
        if site not in sites:
            raise BaseError(f"{site}: the base has no such place")
        if site.name not in SUBLAYERS:
            linears[site] = LinearDeltas(
                _only(InputScale, deltas), _only(Affine, deltas), _only(LowRank, deltas)
            )
        else:
            bottlenecks[site] = _only(Bottleneck, deltas)
        _check_kinds(site, deltas)
    _check_head(by_site[HEAD])
    return PlacedDeltas(
        linears,
        bottlenecks,
        [d for d in by_site[_EMBEDDING] if isinstance(d, EmbeddingLowRank | EmbeddingRows)],
        [d for d in by_site[HEAD] if isinstance(d, LowRank | HeadRows | HeadWeight)],
    )


_EMBEDDING = Site(-1, "embed_tokens")


def _site(delta: Delta) -> Site:
    if isinstance(delta, EmbeddingLowRank | EmbeddingRows):
        return _EMBEDDING
    if isinstance(delta, HeadRows | HeadWeight):
        return HEAD
    return delta.site


def _only(kind: type[T], deltas: Sequence[object]) -> list[T]:
    return [delta for delta in deltas if isinstance(delta, kind)]


def _check_kinds(site: Site, deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if isinstance(delta, Bottleneck) != (site.name in SUBLAYERS):
            raise BaseError(f"{site}: {type(delta).__name__} does not act there")


def _check_head(deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if isinstance(delta, Affine | InputScale):
            raise BaseError(f"{HEAD}: {type(delta).__name__} is not trained on the output head")


def adapted_linears(
    linears: FrozenLinears, x: Tensor, deltas: Sequence[LinearDeltas], dropout: float
) -> Tensor:
    """The outputs of linears over one input, each with its own deltas, in the order of ``primitives``.

    Args:
        linears: the base's.
        x: [N, d_in], compute dtype.
        deltas: of each part.
        dropout: of the input of low-rank deltas.

    Returns:
        [N, all outputs]; the compute dtype, or float32 where outputs are rescaled.
    """
    if any(each.input_scales or each.affines for each in deltas):
        parts = [_adapted_part(linears, part, x, each, dropout) for part, each in enumerate(deltas)]
        return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=1)
    terms = [
        LowRankTerm(part, delta.a, delta.b, delta.scale)
        for part, each in enumerate(deltas)
        for delta in each.low_ranks
    ]
    return adapted_product(linears, x, terms, dropout)


def _adapted_part(
    linears: FrozenLinears, part: int, x: Tensor, deltas: LinearDeltas, dropout: float
) -> Tensor:
    rescaled = x
    for rescaling in deltas.input_scales:
        rescaled = rescaled * rescaling.scale.float()
    y = frozen_product(linears, rescaled.to(linears.dtype), part)
    for affine in deltas.affines:
        if affine.scale is not None:
            y = y * affine.scale.float()
        if affine.offset is not None:
            y = y + affine.offset.float()
    for delta in deltas.low_ranks:
        y = y + low_rank_update(x, delta, dropout)
    return y


def low_rank_update(x: Tensor, delta: LowRank, dropout: float) -> Tensor:
    """What a low-rank delta adds to its linear's output: [N, d_in] → [N, d_out], dtype of x."""
    if dropout:
        x = functional.dropout(x, dropout)
    return lora_delta(x, delta.a.to(x.dtype), delta.b.to(x.dtype), delta.scale)


def with_bottlenecks(deltas: Sequence[Bottleneck], residual: Tensor, output: Tensor) -> Tensor:
    """What joins the stream in place of a sub-layer's output; ``residual`` is the stream that entered it."""
    for delta in deltas:
        output = bottleneck_output(delta, residual, output)
    return output


def with_embedding_deltas(
    deltas: Sequence[EmbeddingLowRank | EmbeddingRows], token_ids: Tensor, embedded: Tensor
) -> Tensor:
    """Embeddings [N, D] float32 as the adapter has them, ahead of any multiplier."""
    for delta in deltas:
        if isinstance(delta, EmbeddingLowRank):
            a = delta.a.index_select(0, token_ids).float()
            embedded = embedded + (a @ delta.b.float().T) * delta.scale
        else:
            row = _row_numbers(delta.ids.to(token_ids.device), token_ids)
            own = delta.rows.float().index_select(0, row.clamp(min=0))
            embedded = torch.where((row >= 0).unsqueeze(1), own, embedded)
    return embedded


def _row_numbers(ids: Tensor, token_ids: Tensor) -> Tensor:
    """Where each token stands among ``ids``, −1 where it does not: [N] int64."""
    numbers = token_ids.new_full((int(torch.cat((ids, token_ids)).max()) + 1,), -1)
    numbers[ids] = torch.arange(ids.numel(), device=ids.device)
    return numbers[token_ids]
