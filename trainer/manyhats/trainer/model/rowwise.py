"""Row by row under autograd: RMS norms with frozen weights, rotary embedding by the engine's tables, the gate.

The gated feed-forward's activation keeps only gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.engine.model.rotary import Angles

# Rows at a time on a CPU, so that their float32 values stay in its caches.
_CACHED_VALUES = 1 << 18


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
