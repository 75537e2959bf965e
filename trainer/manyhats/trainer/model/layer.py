"""One layer under autograd: attention, gated feed-forward, and the norms that the family has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters.sites import Site
from manyhats.engine.backends.backend import FUSED
from manyhats.engine.backends.rotary import Angles
from manyhats.engine.model.config import DecoderConfig
from manyhats.engine.model.weights import NORM_NAMES, LayerWeights
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
        weights: LayerWeights,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._index = index
        self._config = config
        self._dtype = dtype
        linears = dict(weights.linears())
        self._linears = {
            name: FrozenLinears([linears[part] for part in parts], dtype, device)
            for name, parts in FUSED.items()
        }
        norms = {name: getattr(weights, name) for name in NORM_NAMES}
        self._norms = {name: norm.to(device) for name, norm in norms.items() if norm is not None}
        self._attention = AttentionKind(
            config.attention_scale, config.sliding_window[index], config.attention_softcap
        )

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
        head_dim, linears = self._config.head_dim, self._linears["qkv"]
        qkv = self._linear("qkv", self._normed("input_norm", residual), step)
        queries, keys, values = qkv.split(linears.sizes, dim=1)
        queries, keys = self._normed("q_norm", queries), self._normed("k_norm", keys)
        queries, keys = (
            rotate(part.unflatten(1, (-1, head_dim)), step.angles, self._dtype) for part in (queries, keys)
        )
        own = (keys, values.to(self._dtype).unflatten(1, (-1, head_dim)))
        mixed = attend(queries, own, step.prefix, step.layout, self._attention)
        return self._linear("o", mixed.flatten(1), step)

    def _feed_forward(self, residual: Tensor, step: LayerPass) -> Tensor:
        """The gated feed-forward and its norm: [N, D] → [N, D]."""
        gate_up = self._linear("gate_up", self._normed("post_attention_norm", residual), step)
        return self._linear("down", gated(gate_up, self._config.activation, self._dtype), step)

    def _linear(self, fused: str, x: Tensor, step: LayerPass) -> Tensor:
        """The outputs of linears over one input, with the adapter's deltas, side by side."""
        deltas = step.deltas.at(self._index, FUSED[fused])
        return adapted_linears(self._linears[fused], x, deltas, step.dropout)

    def _joined(self, sublayer: str, residual: Tensor, out: Tensor, step: LayerPass) -> Tensor:
        """The stream with a sub-layer's output, which is first normed, scaled and adapted."""
        norm = self._norms.get(f"{sublayer}_output_norm")
        if norm is not None:
            out = rms_norm(out, norm, self._config.norm_eps)
        if self._config.residual_scale != 1.0:
            out = out.float() * self._config.residual_scale
        bottlenecks = step.deltas.bottlenecks.get(Site(self._index, sublayer), ())
        if bottlenecks:
            out = with_bottlenecks(bottlenecks, residual, out.float())
        return residual + out

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """RMS norm over as many values at a time as the weight has, as the compute dtype; x where there is none."""
        weight = self._norms.get(name)
        if weight is None:
            return x.to(self._dtype)
        groups = x.unflatten(1, (-1, weight.numel()))
        return rms_norm(groups, weight, self._config.norm_eps, self._dtype).flatten(1)
