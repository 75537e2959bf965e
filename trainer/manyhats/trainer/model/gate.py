"""The gated feed-forward's activation under autograd, which keeps only gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyhats.adapters.activations import ACTIVATIONS

# Rows at a time on a CPU, so that their float32 values stay in its caches.
_CACHED_VALUES = 1 << 18


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
