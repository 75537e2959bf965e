"""One layer under autograd: attention, gated feed-forward, and the norms that the family has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters.sites import Site
from manyhats.engine.model.architecture import Block, Group
from manyhats.engine.model.rotary import Angles
from manyhats.engine.model.weights import BlockWeights
from manyhats.trainer.model.attention import KeysAndValues, attend
from manyhats.trainer.model.blocked_attention import AttentionKind
from manyhats.trainer.model.deltas import PlacedDeltas, adapted_linears, with_bottlenecks
from manyhats.trainer.model.gate import gated
from manyhats.trainer.model.linear import FrozenLinears
from manyhats.trainer.model.norm import rms_norm
from manyhats.trainer.model.rotary import rotate
from manyhats.trainer.model.rows import RowLayout


@dataclass(frozen=True, slots=True, eq=False)
class LayerPass:
    """What one forward of a layer runs with, beside the stream.

    Attributes:
        prefix: the layer's keys and values ahead of every row, or None.
        dropout: of the input of low-rank deltas.
    """

    angles: Angles
    layout: RowLayout
    deltas: PlacedDeltas
    prefix: KeysAndValues | None
    dropout: float


class FrozenLayer:
    """One layer's weights, and its forward."""

    def __init__(
        self,
        index: int,
        block: Block,
        weights: BlockWeights,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._index = index
        self._block = block
        self._dtype = dtype
        self._groups: dict[str, Group] = {group.name: group for group in block.groups()}
        self._linears = {
            name: FrozenLinears([weights.linears[member] for member in group.names], dtype, device)
            for name, group in self._groups.items()
        }
        self._norms = {
            shape.name: (weights.norms[shape.name].weight.to(device), shape.norm.eps)
            for shape in block.norms()
        }
        attention = block.attention
        self._attention = AttentionKind(attention.scale, attention.window, attention.softcap)

    @property
    def linear_bytes(self) -> int:
        """Resident bytes of its linears."""
        return sum(linears.num_bytes for linears in self._linears.values())

    def forward(self, residual: Tensor, step: LayerPass) -> Tensor:
        """The residual stream behind this layer: [N, D] float32 → the same."""
        out = self._attend(residual, step)
        residual = self._joined("attention", residual, out, step)
        out = self._feed_forward(residual, step)
        return self._joined("feed_forward", residual, out, step)

    def _attend(self, residual: Tensor, step: LayerPass) -> Tensor:
        """Attention, its norm and output projection included: [N, D] → [N, D]."""
        head_dim, linears = self._block.attention.head_dim, self._linears["qkv"]
        qkv = self._linear("qkv", self._normed("attention_before", residual), step)
        queries, keys, values = qkv.split(linears.sizes, dim=1)
        queries, keys = self._normed("query", queries), self._normed("key", keys)
        queries, keys = (
            rotate(part.unflatten(1, (-1, head_dim)), step.angles, self._dtype) for part in (queries, keys)
        )
        own = (keys, values.to(self._dtype).unflatten(1, (-1, head_dim)))
        mixed = attend(queries, own, step.prefix, step.layout, self._attention)
        return self._linear("o", mixed.flatten(1), step)

    def _feed_forward(self, residual: Tensor, step: LayerPass) -> Tensor:
        """The gated feed-forward and its norm: [N, D] → [N, D]."""
        gate_up = self._linear("gate_up", self._normed("feed_forward_before", residual), step)
        return self._linear("down", gated(gate_up, self._block.feed_forward.activation, self._dtype), step)

    def _linear(self, fused: str, x: Tensor, step: LayerPass) -> Tensor:
        """The outputs of linears over one input, with the adapter's deltas, side by side."""
        deltas = step.deltas.at(self._index, self._groups[fused].names)
        return adapted_linears(self._linears[fused], x, deltas, step.dropout)

    def _joined(self, sublayer: str, residual: Tensor, out: Tensor, step: LayerPass) -> Tensor:
        """The stream with a sub-layer's output, which is first normed, scaled and adapted."""
        norm = self._norms.get(f"{sublayer}_output")
        if norm is not None:
            out = rms_norm(out, *norm)
        if self._block.residual_scale != 1.0:
            out = out.float() * self._block.residual_scale
        bottlenecks = step.deltas.bottlenecks.get(Site(self._index, sublayer), ())
        if bottlenecks:
            out = with_bottlenecks(bottlenecks, residual, out.float())
        return residual + out

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """RMS norm over as many values at a time as the weight has, as the compute dtype; x where there is none."""
        norm = self._norms.get(name)
        if norm is None:
            return x.to(self._dtype)
        weight, eps = norm
        groups = x.unflatten(1, (-1, weight.numel()))
        return rms_norm(groups, weight, eps, self._dtype).flatten(1)
