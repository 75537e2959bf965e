"""An adapter lowered once for all micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.primitives import LoweredAdapter


class LoweredOnce:
    """Primitives detached from their parameters, which collect the micro-batches' gradients.

    Lowering may cost as much as a forward: DoRA's reads every weight of the base. The parameters do not change within a
    step, so it is done once, and ``backward`` goes back through it once.

    Args:
        lowered: with gradient history.
    """

    def __init__(self, lowered: LoweredAdapter) -> None:
        self._made: list[Tensor] = []
        self._cut: dict[int, Tensor] = {}
        self.adapter: LoweredAdapter = _map_tensors(lowered, self._leaf)

    def backward(self) -> None:
        """Propagate the collected gradients to the parameters. Call it once."""
        collected = [(made, self._cut[id(made)].grad) for made in self._made]
        reached = [(made, grad) for made, grad in collected if grad is not None]
        if reached:
            torch.autograd.backward([made for made, _ in reached], [grad for _, grad in reached])

    def _leaf(self, tensor: Tensor) -> Tensor:
        """A leaf in place of the tensor; the same one wherever it occurs."""
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in self._cut:
            self._made.append(tensor)
            self._cut[id(tensor)] = tensor.detach().requires_grad_()
        return self._cut[id(tensor)]


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested frozen dataclasses and tuples with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _map_tensors(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **changed)
    return value
