"""Rotary embedding under autograd; the tables are the engine's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyhats.engine.model.rotary import Angles


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
