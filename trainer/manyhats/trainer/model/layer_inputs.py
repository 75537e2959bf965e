"""What gradient checkpointing keeps: every layer's input, in one block of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LayerInputs:
    """Storage for the residual stream before each layer, until the backward pass is over.

    Kept where it was made, each input would lie among the memory that its layer frees, and split it into holes too
    small for the next layer's tensors: the heap would grow at every layer.

    Args:
        num_layers: L.
        residual: [N, D], the first layer's input.
    """

    def __init__(self, num_layers: int, residual: Tensor) -> None:
        self._storage = residual.new_empty(num_layers, *residual.shape).untyped_storage()

    def keep(self, index: int, residual: Tensor) -> Tensor:
        """The input of layer ``index``, stored; the gradient passes through unchanged."""
        kept: Tensor = _Kept.apply(residual, self._storage, index)  # type: ignore[no-untyped-call]
        return kept


class _Kept(torch.autograd.Function):
    """A copy that autograd does not see as a view: functions may not return views of what is written to."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, storage: torch.UntypedStorage, index: int) -> Tensor:
        place: Tensor = residual.new_empty(0)
        place.set_(storage, index * residual.numel(), residual.shape, residual.stride())
        return place.copy_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
