"""RMS norms under autograd, with frozen weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
