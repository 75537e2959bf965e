"""The operations of ``engine.model.forward`` under autograd: each keeps as little between the passes as it can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters import equations
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    EmbeddingLowRank,
    EmbeddingRows,
    InputScale,
    KVPrefix,
    LowRank,
)
from manyhats.adapters.sites import EMBEDDING, Site
from manyhats.engine.model.architecture import Architecture, FeedForward, Group, Norm, Rope
from manyhats.engine.model.rotary import Angles
from manyhats.engine.model.weights import NormWeight
from manyhats.trainer.model.attention import attend
from manyhats.trainer.model.deltas import PlacedDeltas
from manyhats.trainer.model.head import Head
from manyhats.trainer.model.linear import FrozenLinears, adapted_product, frozen_product, low_rank_update
from manyhats.trainer.model.rows import RowLayout
from manyhats.trainer.model.rowwise import gated, rms_norm, rotate


@dataclass(frozen=True, slots=True, eq=False)
class FrozenBase:
    """The base's operations under autograd, on the device.

    Attributes:
        dtype: of the products, and of the outputs of norms, activations and attention.
        linears: for each layer, its groups by name.
    """

    architecture: Architecture
    dtype: torch.dtype
    embedding: Tensor
    linears: list[dict[str, FrozenLinears]]
    head: Head


@dataclass(frozen=True, slots=True, eq=False)
class TrainingMaths:
    """``Maths`` for one pass, whose rows all have the same adapter.

    Attributes:
        prefix: keys and values before every row, or None.
        dropout: of the input of low-rank deltas.
        angles: the rows', on the device.
    """

    base: FrozenBase
    deltas: PlacedDeltas
    prefix: KVPrefix | None
    dropout: float
    angles: Mapping[Rope | None, Angles]
    layout: RowLayout

    def embed(self, token_ids: Tensor) -> Tensor:
        """Float32."""
        x = self.base.embedding.index_select(0, token_ids).float()
        for low_rank in self.deltas.at(EMBEDDING, EmbeddingLowRank):
            x = equations.embedding(low_rank, token_ids, x)
        for replaced in self.deltas.at(EMBEDDING, EmbeddingRows):
            x = equations.embedding(replaced, token_ids, x)
        return x

    def linears(self, layer: int, group: Group, x: Tensor) -> Tensor:
        """The compute dtype, or float32 if outputs are rescaled; keeps x if a delta is trained on it."""
        linears, x = self.base.linears[layer][group.name], x.to(self.base.dtype)
        sites = [Site(layer, name) for name in group.names]
        if any(self.deltas.at(site, InputScale) or self.deltas.at(site, Affine) for site in sites):
            parts = [self._linear(linears, part, site, x) for part, site in enumerate(sites)]
            return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=1)
        terms = [(part, delta) for part, site in enumerate(sites) for delta in self.deltas.at(site, LowRank)]
        return adapted_product(linears, x, terms, self.dropout)

    def _linear(self, linears: FrozenLinears, part: int, site: Site, x: Tensor) -> Tensor:
        """One of them alone."""
        rescaled = x
        for rescaling in self.deltas.at(site, InputScale):
            rescaled = rescaled * rescaling.scale.float()
        y = frozen_product(linears, rescaled.to(linears.dtype), part)
        for affine in self.deltas.at(site, Affine):
            y = equations.affine(y, affine)
        for low_rank in self.deltas.at(site, LowRank):
            y = y + low_rank_update(x, low_rank, self.dropout)
        return y

    def norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """The compute dtype; keeps x and one number per row."""
        return rms_norm(x, weight.weight, norm.eps, self.base.dtype)

    def output_norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """Float32; keeps the same."""
        return rms_norm(x, weight.weight, norm.eps)

    def rotate(self, heads: Tensor, rope: Rope) -> Tensor:
        """The compute dtype; keeps the angles."""
        return rotate(heads.to(self.base.dtype), self.angles[rope])

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The compute dtype; keeps its inputs and output, but no scores."""
        prefix = None if self.prefix is None else (self.prefix.keys[layer], self.prefix.values[layer])
        queries, keys, values = (part.to(self.base.dtype) for part in (queries, keys, values))
        spec = self.base.architecture.blocks[layer].attention
        return attend(queries, (keys, values), prefix, self.layout, spec)

    def activate(self, gate_up: Tensor, feed_forward: FeedForward) -> Tensor:
        """The compute dtype; keeps gate and up."""
        return gated(gate_up, feed_forward.activation, self.base.dtype)

    def join(self, site: Site, stream: Tensor, output: Tensor) -> Tensor:
        """Float32."""
        for delta in self.deltas.at(site, Bottleneck):
            output = equations.bottleneck(delta, stream, output.float())
        return stream + output

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 throughout; the loss is ``Head.loss``."""
        return self.base.head.outputs(hidden, self.deltas)
