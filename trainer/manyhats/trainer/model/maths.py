"""The operations of ``engine.model.forward`` under autograd: each keeps as little between the passes as it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from manyhats.adapters import equations
from manyhats.adapters.activations import ACTIVATIONS
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
from manyhats.engine.model.architecture import Block, FeedForward, Group, Learned, Norm, Rope
from manyhats.engine.model.forward import StreamNorm, mixed_by_expert
from manyhats.engine.model.rotary import Angles
from manyhats.engine.model.weights import NormWeight
from manyhats.trainer.model.attention import attend
from manyhats.trainer.model.deltas import PlacedDeltas
from manyhats.trainer.model.frozen_base import FrozenBase
from manyhats.trainer.model.linear import FrozenLinears, adapted_product, frozen_product, low_rank_update
from manyhats.trainer.model.rows import RowLayout

# Rows at a time on a CPU, so that their float32 values stay in its caches.
_CACHED_VALUES = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class TrainingMaths:
    """``Maths`` for one pass, whose rows all have the same adapter.

    Attributes:
        prefix: keys and values before every row, or None.
        dropout: of the input of low-rank deltas.
        positions: the rows', [N] int64 on the device.
        types: of the rows' tokens, likewise; None if all are 0.
        angles: of the positions.
    """

    base: FrozenBase
    deltas: PlacedDeltas
    prefix: KVPrefix | None
    dropout: float
    positions: Tensor
    types: Tensor | None
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

    def locate(self, learned: Learned) -> Tensor:
        """Float32."""
        assert self.base.positions is not None
        return self.base.positions.index_select(0, self.positions + learned.offset).float()

    def token_types(self) -> Tensor:
        """Float32."""
        assert self.base.token_types is not None
        types = torch.zeros_like(self.positions) if self.types is None else self.types
        return self.base.token_types.index_select(0, types).float()

    def enter(self, x: Tensor) -> Tensor:
        """No adapter is trained there."""
        return x

    def project(self, name: str, x: Tensor) -> Tensor:
        """Float32."""
        return frozen_product(self.base.outer[name], x, 0)

    def linears(self, layer: int, group: Group, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The compute dtype, or float32 if outputs are rescaled; keeps x if a delta is trained on it."""
        linears = self.base.linears[layer][group.name]
        x = x.to(linears.dtype)
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
        """The compute dtype; keeps x and one number per row, or two."""
        return normed(x, norm, weight, self.base.dtype)

    def output_norm(self, x: Tensor, norm: Norm, weight: NormWeight) -> Tensor:
        """Float32; keeps the same."""
        return normed(x, norm, weight)

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
        """The compute dtype; keeps its input."""
        apply = gated if feed_forward.is_gated else activated
        return apply(gate_up, feed_forward.activation, self.base.dtype)

    def mix(self, layer: int, spec: Block, x: Tensor) -> Tensor:
        """Float32."""
        return mixed_by_expert(self, layer, spec, x)

    def join(self, site: Site, stream: Tensor, output: Tensor, norm: StreamNorm | None) -> Tensor:
        """Float32."""
        normed = None if norm is None else partial(self.output_norm, norm=norm[0], weight=norm[1])
        skips_norm = False
        for delta in self.deltas.at(site, Bottleneck):
            output = equations.bottleneck(delta, stream, output.float(), normed)
            skips_norm |= delta.skips_norm
        stream = stream + output
        return stream if normed is None or skips_norm else normed(stream)

    def output(self, layer: int, stream: Tensor) -> Tensor:
        """No adapter is trained there."""
        return stream

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 throughout; the loss is ``Head.loss``."""
        assert self.base.head is not None  # encoders have no logits
        return self.base.head.outputs(hidden, self.deltas)


def normed(x: Tensor, norm: Norm, weight: NormWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The norm of x [..., shape of the weight], computed in float32, as ``dtype``."""
    if norm.kind == "rms" and weight.bias is None:
        return rms_norm(x, weight.weight, norm.eps, dtype)
    x = x.float()
    if norm.kind == "layer" and weight.weight.dim() == 1:
        size = weight.weight.shape
        return functional.layer_norm(x, size, weight.weight, weight.bias, norm.eps).to(dtype)
    if norm.kind == "layer":  # each head with its own weight
        y = functional.layer_norm(x, x.shape[-1:], eps=norm.eps) * weight.weight
    else:
        y = rms_norm(x, weight.weight, norm.eps)
    return (y if weight.bias is None else y + weight.bias).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x / √(mean(x²) + eps) · weight`` over the last dimension, computed in float32.

    Args:
        x: [..., D], float32 or the compute dtype.
        weight: [D] float32.
        eps: added to the mean square.
        dtype: of the result.
    """
    normed: Tensor = _RmsNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return normed


class _RmsNorm(torch.autograd.Function):
    """With ``s = 1 / √(mean(x²) + eps)`` and ``g = grad · weight``, ``dx = s · (g − x · s² · mean(g · x))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        values = x.float()
        mean_square = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (values * scale).mul_(weight)
        return normed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        values = x.float()
        g = grad * weight
        mean = torch.linalg.vecdot(g, values).unsqueeze(-1) / x.shape[-1]
        return g.addcmul_(values, mean * scale.square(), value=-1).mul_(scale).to(x.dtype), None, None, None


def rotate(heads: Tensor, angles: Angles) -> Tensor:
    """Rotate the first ``rotary_dim`` values of each head, by halves, in float32.

    Args:
        heads: [N, H, K].
        angles: cosines and sines [N, rotary_dim / 2].

    Returns:
        The same shape and dtype.
    """
    rotated: Tensor = _Rotation.apply(heads, *angles)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """Its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, sign=-1), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
    out = heads.new_empty(heads.shape)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-sign)
    out[..., half : 2 * half] = (second * cos).addcmul_(first, sin, value=sign)
    if 2 * half < heads.shape[-1]:
        out[..., 2 * half :] = heads[..., 2 * half :]
    return out


def gated(gate_up: Tensor, activation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """``activation(gate) · up``, computed in float32.

    Args:
        gate_up: [N, 2·I], gate then up.
        activation: of the gate, a name in ``ACTIVATIONS``.
        dtype: of the result, [N, I].
    """
    product: Tensor = _GatedProduct.apply(gate_up, activation, dtype)  # type: ignore[no-untyped-call]
    return product


def activated(x: Tensor, activation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """``activation(x)``, computed in float32.

    Args:
        x: [N, I].
        activation: a name in ``ACTIVATIONS``.
        dtype: of the result.
    """
    result: Tensor = _Activation.apply(x, activation, dtype)  # type: ignore[no-untyped-call]
    return result


class _Activation(torch.autograd.Function):
    """``act(x)``; its gradient is ``act'(x) · grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        out = x.new_empty(x.shape, dtype=dtype)
        for rows in _row_blocks(x):
            out[rows] = ACTIVATIONS[activation](x[rows].float())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            result = ACTIVATIONS[ctx.activation](leaf)
        return torch.autograd.grad(result, leaf, grad.to(x.dtype))[0], None, None


class _GatedProduct(torch.autograd.Function):
    """``act(gate) · up``; the gradients are ``act'(gate) · up · grad`` and ``act(gate) · grad``."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=dtype)
        for rows in _row_blocks(gate_up):
            gate, up = gate_up[rows].float().chunk(2, dim=1)
            out[rows] = ACTIVATIONS[activation](gate) * up
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        grad = grad.to(gate_up.dtype)
        gate, up = gate_up.chunk(2, dim=1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=1)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ACTIVATIONS[ctx.activation](leaf)
        torch.mul(activated.detach(), grad, out=d_up)
        d_gate.copy_(torch.autograd.grad(activated, leaf, grad * up)[0])
        return d_gate_up, None, None


def _row_blocks(x: Tensor) -> Iterator[slice]:
    size = max(1, _CACHED_VALUES // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)
