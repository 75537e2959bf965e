"""The output head: logits, and a cross-entropy that never holds all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from manyhats.adapters.primitives import Delta, HeadRows, HeadWeight, LowRank
from manyhats.adapters.sites import HEAD
from manyhats.engine.model import architecture
from manyhats.engine.model.forward import scaled_logits
from manyhats.engine.model.weights import Linear
from manyhats.trainer.model.deltas import PlacedDeltas
from manyhats.trainer.model.linear import FrozenLinears, adapted_product, frozen_product, low_rank_update

CHUNK_VALUES = 1 << 24
"""Logits computed at a time: 64 MiB of float32."""

CACHED_VALUES = 1 << 20
"""How many of them the loss processes at a time."""

EXACT_ROWS = 1 << 13
"""Rows of a bfloat16 head that are converted to float32 at a time."""


class Head:
    """From normed hidden states to logits, [M, D] → [M, V], and to their loss.

    The training loss runs in the compute dtype; reported logits and log-probabilities are float32 throughout.
    """

    def __init__(
        self, linear: Linear, spec: architecture.Head, dtype: torch.dtype, device: torch.device
    ) -> None:
        weight, bias = linear.matrix, linear.bias
        assert isinstance(weight, Tensor)  # NF4 is for the blocks' linears
        self._linear = FrozenLinears([linear], dtype, device)
        # In parts, so that the whole head is never copied in float32.
        size = weight.shape[0] if weight.dtype == torch.float32 else EXACT_ROWS
        blocks = weight.split(size)
        biases = [None] * len(blocks) if bias is None else bias.split(size)
        parts = [Linear(*pair) for pair in zip(blocks, biases, strict=True)]
        self._exact = FrozenLinears(parts, torch.float32, device)
        self.spec = spec
        self._chunk_rows = max(1, CHUNK_VALUES // weight.shape[0])

    def outputs(self, hidden: Tensor, deltas: PlacedDeltas) -> Tensor:
        """The logits, [M, V] float32.

        Args:
            hidden: [M, D] float32.
            deltas: the adapter's.
        """
        blocks = range(len(self._exact.sizes))
        base = torch.cat([frozen_product(self._exact, hidden, block) for block in blocks], dim=1)
        return _adapted(hidden, base, deltas, 0.0)

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, targets: Tensor, deltas: PlacedDeltas) -> Tensor:
        """Log-probabilities of the targets, ``log softmax(logits)[target]``, [M] float32; arguments as for ``loss``."""
        chunks = zip(hidden.split(self._chunk_rows), targets.split(self._chunk_rows), strict=True)
        parts = [
            -functional.cross_entropy(
                scaled_logits(self.outputs(rows, deltas), self.spec), wanted, reduction="none"
            )
            for rows, wanted in chunks
        ]
        return torch.cat(parts) if parts else hidden.new_empty(0)

    def loss(self, hidden: Tensor, targets: Tensor, deltas: PlacedDeltas, dropout: float = 0.0) -> Tensor:
        """The sum of ``−log softmax(logits)[target]``.

        Args:
            hidden: [M, D] float32.
            targets: [M] int64.
            deltas: the adapter's.
            dropout: of the input of low-rank deltas.

        Returns:
            A float32 scalar.
        """
        if not torch.is_grad_enabled():
            return -self.log_probabilities(hidden, targets, deltas).sum()

        own = deltas.by_site.get(HEAD, ())

        def logits_of(rows: Tensor, tensors: Sequence[Tensor]) -> Tensor:
            x = rows.to(self._linear.dtype)
            base = adapted_product(self._linear, x, ())
            replaced = PlacedDeltas({HEAD: _with_tensors(own, tensors)})
            return scaled_logits(_adapted(x, base, replaced, dropout), self.spec)

        flat = [tensor for delta in own for tensor in _tensors(delta).values()]
        total: Tensor = _ChunkedLoss.apply(logits_of, self._chunk_rows, targets, hidden, *flat)  # type: ignore[no-untyped-call]
        return total


def _adapted(x: Tensor, outputs: Tensor, deltas: PlacedDeltas, dropout: float) -> Tensor:
    """The base's outputs as the adapter changes them; the adapter's own head comes before its deltas."""
    for own in deltas.at(HEAD, HeadWeight):
        outputs = functional.linear(x, own.weight.to(x.dtype), _in_dtype(own.bias, x))
    for replaced in deltas.at(HEAD, HeadRows):
        columns = functional.linear(x, replaced.rows.to(x.dtype), _in_dtype(replaced.bias, x))
        outputs = outputs.index_copy(1, replaced.ids.to(x.device), columns)
    for low_rank in deltas.at(HEAD, LowRank):
        outputs = outputs + low_rank_update(x, low_rank, dropout)
    return outputs


def _in_dtype(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.device, x.dtype)


def _tensors(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a delta that may be trained, by field."""
    values = {field.name: getattr(delta, field.name) for field in fields(delta)}
    return {n: v for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _with_tensors(deltas: Sequence[Delta], tensors: Sequence[Tensor]) -> list[Delta]:
    """The deltas with other tensors in place of ``_tensors``."""
    left: Iterator[Any] = iter(tensors)
    return [replace(delta, **dict(zip(_tensors(delta), left, strict=False))) for delta in deltas]


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of ``−log softmax(logits)[target]``, in float32; overwrites the logits with its gradient.

    Takes a few rows at a time, so that intermediate results stay in the processor's cache.

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
    """The summed cross-entropy, some rows at a time; gradients are computed in the forward pass.

    So each chunk's logits are computed once and not kept.
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
