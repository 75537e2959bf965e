"""What gradient checkpointing keeps: every layer's input, in one block of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LayerInputs:
    """A place for the residual stream ahead of each layer, until the backward pass is over.

    Kept as it comes, each input would lie amidst what its layer frees, and cut that into holes that are too small for
    the next layer's tensors: an allocator's heap would grow by those at every layer.

    Args:
        num_layers: L.
        residual: [N, D], as the first layer has it.
    """

    def __init__(self, num_layers: int, residual: Tensor) -> None:
        self._storage = residual.new_empty(num_layers, *residual.shape).untyped_storage()

    def keep(self, index: int, residual: Tensor) -> Tensor:
        """The input of layer ``index``, in its place; the gradient passes as it is."""
        kept: Tensor = _Kept.apply(residual, self._storage, index)  # type: ignore[no-untyped-call]
        return kept


class _Kept(torch.autograd.Function):
    """A copy that is no view to autograd, which forbids functions to give out views of what is written to."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, storage: torch.UntypedStorage, index: int) -> Tensor:
        place: Tensor = residual.new_empty(0)
        place.set_(storage, index * residual.numel(), residual.shape, residual.stride())
        return place.copy_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
