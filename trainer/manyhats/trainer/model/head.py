"""The output head: logits, and the cross-entropy that never holds all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from manyhats.adapters.primitives import HeadRows, HeadWeight, LowRank
from manyhats.engine.model import architecture
from manyhats.engine.model.weights import Linear
from manyhats.trainer.model.deltas import low_rank_update
from manyhats.trainer.model.linear import FrozenLinears, adapted_product, frozen_product

HeadDelta = LowRank | HeadRows | HeadWeight

CHUNK_VALUES = 1 << 24
"""Logits computed at a time: 64 MiB of float32."""

CACHED_VALUES = 1 << 20
"""Of them, as many as the loss takes at a time."""

EXACT_ROWS = 1 << 13
"""Rows of a bfloat16 head that are made float32 at a time."""


class Head:
    """From normed hidden states to logits, [M, D] → [M, V], and to their loss.

    What is trained on runs in the compute dtype. What is reported, logits and log-probabilities, is float32 throughout.
    """

    def __init__(
        self, weight: Tensor, kind: architecture.Head, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._linear = FrozenLinears([Linear(weight)], dtype, device)
        # In parts, so that no float32 copy of all of it is ever made.
        blocks = weight.split(weight.shape[0] if weight.dtype == torch.float32 else EXACT_ROWS)
        self._exact = FrozenLinears([Linear(block) for block in blocks], torch.float32, device)
        self._kind = kind
        self._chunk_rows = max(1, CHUNK_VALUES // weight.shape[0])

    def logits(self, hidden: Tensor, deltas: Sequence[HeadDelta]) -> Tensor:
        """All logits, float32.

        Args:
            hidden: [M, D] float32.
            deltas: of the head.
        """
        blocks = range(len(self._exact.sizes))
        base = torch.cat([frozen_product(self._exact, hidden, block) for block in blocks], dim=1)
        return self._adapted(hidden, base, deltas, 0.0)

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, targets: Tensor, deltas: Sequence[HeadDelta]) -> Tensor:
        """Of each target: log softmax(logits)[target], [M] float32; arguments as of ``loss``."""
        chunks = zip(hidden.split(self._chunk_rows), targets.split(self._chunk_rows), strict=True)
        parts = [
            -functional.cross_entropy(self.logits(rows, deltas), wanted, reduction="none")
            for rows, wanted in chunks
        ]
        return torch.cat(parts) if parts else hidden.new_empty(0)

    def loss(
        self, hidden: Tensor, targets: Tensor, deltas: Sequence[HeadDelta], dropout: float = 0.0
    ) -> Tensor:
        """The sum of −log softmax(logits)[target].

        Args:
            hidden: [M, D] float32.
            targets: [M] int64.
            deltas: of the head.
            dropout: of the input of low-rank deltas.

        Returns:
            A float32 scalar.
        """
        if not torch.is_grad_enabled():
            return -self.log_probabilities(hidden, targets, deltas).sum()

        def logits_of(rows: Tensor, tensors: Sequence[Tensor]) -> Tensor:
            x = rows.to(self._linear.dtype)
            base = adapted_product(self._linear, x, ())
            return self._adapted(x, base, _with_tensors(deltas, tensors), dropout)

        flat = [tensor for delta in deltas for tensor in _tensors(delta)]
        total: Tensor = _ChunkedLoss.apply(logits_of, self._chunk_rows, targets, hidden, *flat)  # type: ignore[no-untyped-call]
        return total

    def _adapted(self, x: Tensor, logits: Tensor, deltas: Sequence[HeadDelta], dropout: float) -> Tensor:
        """The base's logits as the adapter has them; a head of its own comes before what changes it."""
        for delta in deltas:
            if isinstance(delta, HeadWeight):
                logits = x @ delta.weight.to(x.dtype).T
        for delta in deltas:
            if isinstance(delta, HeadRows):
                logits = logits.index_copy(1, delta.ids.to(x.device), x @ delta.rows.to(x.dtype).T)
        for delta in deltas:
            if isinstance(delta, LowRank):
                logits = logits + low_rank_update(x, delta, dropout)
        divisor, cap = self._kind.divisor, self._kind.softcap
        if divisor != 1.0:
            logits = logits / divisor
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _tensors(delta: HeadDelta) -> list[Tensor]:
    """What of a delta may be trained."""
    if isinstance(delta, LowRank):
        return [delta.a, delta.b]
    return [delta.rows if isinstance(delta, HeadRows) else delta.weight]


def _with_tensors(deltas: Sequence[HeadDelta], tensors: Sequence[Tensor]) -> list[HeadDelta]:
    """The deltas with other tensors in the place of ``_tensors``."""
    left = iter(tensors)
    replaced: list[HeadDelta] = []
    for delta in deltas:
        if isinstance(delta, LowRank):
            replaced.append(replace(delta, a=next(left), b=next(left)))
        elif isinstance(delta, HeadRows):
            replaced.append(replace(delta, rows=next(left)))
        else:
            replaced.append(replace(delta, weight=next(left)))
    return replaced


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of −log softmax(logits)[target], in float32; the logits become its gradient, softmax less the target.

    A few rows at a time, so that what is computed in between stays in a processor's cache.

    Args:
        logits: [M, V], overwritten.
        targets: [M] int64.
    """
    total = torch.zeros((), device=logits.device)
    size = max(1, CACHED_VALUES // logits.shape[1])
    for rows, wanted in zip(logits.split(size), targets.unsqueeze(1).split(size), strict=True):
        values = rows.float()
        chosen = values.gather(1, wanted)
        top = values.amax(1, keepdim=True)
        exponentials = values.sub_(top).exp_()
        sums = exponentials.sum(1, keepdim=True)
        total += (sums.log() + top - chosen).sum()
        rows.copy_(exponentials.div_(sums).scatter_add_(1, wanted, torch.full_like(sums, -1.0)))
    return total


class _ChunkedLoss(torch.autograd.Function):
    """The summed cross-entropy, some rows at a time; gradients are made in the forward pass.

    So each chunk's logits are computed once, and nothing of them is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor, Sequence[Tensor]], Tensor],
        chunk_rows: int,
        targets: Tensor,
        hidden: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needed[1:], strict=True)]
        total = hidden.new_zeros(())
        parts: list[Tensor] = []
        for rows, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
            leaf = rows.detach().requires_grad_(needed[0])
            with torch.enable_grad():
                logits = logits_of(leaf, leaves)
            gradient = logits.detach()
            total += cross_entropy_(gradient, wanted)
            if logits.requires_grad:
                logits.backward(gradient)
            if leaf.grad is not None:
                parts.append(leaf.grad)
        ctx.gradients = [torch.cat(parts) if parts else None, *(leaf.grad for leaf in leaves)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if each is None else each * grad for each in gradients)
