"""Frozen linears under autograd: the weight is dequantized in the forward pass, and again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from manyhats.adapters import equations
from manyhats.adapters.primitives import LowRank
from manyhats.engine.model.nf4 import BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Linear, Matrix

_NF4_TENSORS = ("packed", "absmax", "nested_absmax", "code", "nested_code")


class FrozenLinears:
    """Linears over the same input, run as one product: ``y = x Wᵀ + bias``, the parts side by side.

    They are never trained, so backward needs only W: nothing the size of x or of a dense W is kept between the passes
    for them.
    """

    def __init__(self, parts: Sequence[Linear], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.sizes = [part.out_features for part in parts]
        self.in_features = parts[0].in_features
        self._matrices = [FrozenMatrix(part.matrix, device) for part in parts]
        self._biases = [None if part.bias is None else part.bias.to(device, dtype) for part in parts]
        self._device = device

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights, with their quantization statistics."""
        return sum(matrix.num_bytes for matrix in self._matrices)

    def columns(self, part: int) -> slice:
        """Where a part's outputs are."""
        start = sum(self.sizes[:part])
        return slice(start, start + self.sizes[part])

    def dense(self, parts: Sequence[int], num_more: int = 0) -> Tensor:
        """Weights of some parts, stacked by rows, in the compute dtype.

        Args:
            parts: which.
            num_more: the number of free columns to leave after the weights'.

        Returns:
            [outputs, d_in + num_more]; owned by the caller if columns are left free.
        """
        if len(parts) == 1 and not num_more:
            return self._matrices[parts[0]].dense(self.dtype)
        num_rows = sum(self.sizes[part] for part in parts)
        joined = torch.empty(num_rows, self.in_features + num_more, dtype=self.dtype, device=self._device)
        start = 0
        for part in parts:
            rows = slice(start, start + self.sizes[part])
            self._matrices[part].dense_into(joined[rows, : self.in_features])
            start = rows.stop
        return joined

    def bias(self, parts: Sequence[int]) -> Tensor | None:
        """Biases of some parts side by side, [outputs]; None if none has one."""
        biases = [self._biases[part] for part in parts]
        if all(bias is None for bias in biases):
            return None
        zeros = (torch.zeros(self.sizes[part], dtype=self.dtype, device=self._device) for part in parts)
        return torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])


def frozen_product(linears: FrozenLinears, x: Tensor, part: int) -> Tensor:
    """The output of one part alone: [N, d_in] → [N, d_out], compute dtype."""
    output: Tensor = _FrozenProduct.apply(x, linears, (part,))  # type: ignore[no-untyped-call]
    return output


def adapted_product(
    linears: FrozenLinears, x: Tensor, terms: Sequence[tuple[int, LowRank]], dropout: float = 0.0
) -> Tensor:
    """The outputs of all parts with their low-rank deltas, side by side.

    Args:
        linears: L of them.
        x: [N, d_in], compute dtype.
        terms: each with its part, in any order; those of one part add up.
        dropout: of the terms' input; one draw for all of them.

    Returns:
        [N, all outputs], compute dtype: each part is ``x Wᵀ + bias + Σ low_rank(dropout(x), a, b, scale)``.
    """
    parts = range(len(linears.sizes))
    if not terms:
        output: Tensor = _FrozenProduct.apply(x, linears, parts)  # type: ignore[no-untyped-call]
        return output
    kept = functional.dropout(torch.ones_like(x), dropout) if dropout else None
    spec = [(linears.columns(part), delta.scale) for part, delta in terms]
    tensors = [tensor for _, delta in terms for tensor in (delta.a, delta.b)]
    adapted: Tensor = _AdaptedProduct.apply(x, kept, linears, spec, *tensors)  # type: ignore[no-untyped-call]
    return adapted


def low_rank_update(x: Tensor, delta: LowRank, dropout: float) -> Tensor:
    """A low-rank delta's own contribution to its linear's output: [N, d_in] → [N, d_out], dtype of x."""
    if dropout:
        x = functional.dropout(x, dropout)
    return equations.low_rank(x, delta.a.to(x.dtype), delta.b.to(x.dtype), delta.scale)


class _FrozenProduct(torch.autograd.Function):
    """The base's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: FrozenLinears, parts: Sequence[int]) -> Tensor:
        ctx.linears, ctx.parts = linears, parts
        return functional.linear(x, linears.dense(parts), linears.bias(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.linears.dense(ctx.parts), None, None


class _AdaptedProduct(torch.autograd.Function):
    """Base and low-rank deltas as one product: ``y = [x, h] [W, s·B]ᵀ``, ``h = x Aᵀ``.

    The deltas are columns after W's, so they are summed with the base's output before any rounding, and the one product
    of the backward pass, ``grad [W, s·B]``, gives the gradients of x (except A's part) and of h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        linears: FrozenLinears,
        spec: Sequence[tuple[slice, float]],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.linears, ctx.spec = linears, spec
        h = functional.linear(x if kept is None else x * kept, _stacked(tensors[::2], linears.dtype))
        joined = torch.cat((x, h), dim=1)
        ctx.save_for_backward(joined, kept, *tensors)
        parts = range(len(linears.sizes))
        return functional.linear(joined, _extended(linears, spec, tensors[1::2]), linears.bias(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        joined, kept, *tensors = ctx.saved_tensors
        linears, spec = ctx.linears, ctx.spec
        d_in = linears.in_features
        a, b = tensors[::2], tensors[1::2]
        x, h = joined[:, :d_in], joined[:, d_in:]
        d_x = None
        if ctx.needs_input_grad[0]:
            d_joined = grad @ _extended(linears, spec, b)
            d_h = d_joined[:, d_in:].contiguous()
            d_x = _with_low_rank(d_joined[:, :d_in], d_h, _stacked(a, linears.dtype), kept)
        else:
            d_h = torch.cat(
                [grad[:, at] @ (w * s).to(grad.dtype) for w, (at, s) in zip(b, spec, strict=True)], dim=1
            )
        ranks = [matrix.shape[0] for matrix in a]
        d_a = (d_h.T @ (x if kept is None else x * kept)).split(ranks)
        d_b = [
            (grad[:, at].T @ own) * scale
            for own, (at, scale) in zip(h.split(ranks, dim=1), spec, strict=True)
        ]
        return d_x, None, None, None, *(each for pair in zip(d_a, d_b, strict=True) for each in pair)


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A of all terms, stacked by rows: [ΣR, d_in]."""
    return torch.cat([matrix.to(dtype) for matrix in matrices])


def _extended(linears: FrozenLinears, spec: Sequence[tuple[slice, float]], b: Sequence[Tensor]) -> Tensor:
    """[W, s·B]: [all outputs, d_in + ΣR]; a term's columns are zero in the rows of other parts."""
    extended = linears.dense(range(len(linears.sizes)), sum(matrix.shape[1] for matrix in b))
    start = linears.in_features
    extended[:, start:] = 0
    for matrix, (rows, scale) in zip(b, spec, strict=True):
        stop = start + matrix.shape[1]
        extended[rows, start:stop] = matrix * scale
        start = stop
    return extended


def _with_low_rank(d_x: Tensor, d_h: Tensor, a: Tensor, kept: Tensor | None) -> Tensor:
    """The gradient of x: the base's part, and what comes through h."""
    if kept is None:
        return torch.addmm(d_x, d_h, a)
    return torch.addcmul(d_x, d_h @ a, kept)


class FrozenMatrix:
    """[out, in], never changed; on the CPU it shares the base's memory."""

    def __init__(self, weight: Matrix, device: torch.device) -> None:
        self.weight: Matrix
        if isinstance(weight, Nf4Weight):
            # Imported here, for its operators: it takes seconds, and a dense base needs none of them.
            import bitsandbytes  # noqa: F401

            self.weight = replace(weight, **{name: getattr(weight, name).to(device) for name in _NF4_TENSORS})
        else:
            self.weight = weight.to(device)

    @property
    def num_bytes(self) -> int:
        """Resident bytes, quantization statistics included."""
        if isinstance(self.weight, Nf4Weight):
            return self.weight.num_bytes
        return int(self.weight.numel() * self.weight.element_size())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As a dense matrix; read-only."""
        if isinstance(self.weight, Tensor):
            return self.weight.to(dtype)
        return _dequantized(self.weight, dtype)

    def dense_into(self, out: Tensor) -> None:
        """Write the dense matrix to ``out``, whose rows need not be contiguous."""
        out.copy_(self.weight if isinstance(self.weight, Tensor) else _dequantized(self.weight, out.dtype))


def _dequantized(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed, weight.block_scales(), BLOCK_SIZE, "nf4", weight.shape, dtype
    )
    return values
