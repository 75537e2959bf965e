"""Linears on a device: NF4 weights stay as they are, or are dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Linear


class Product(Protocol):
    """``y = x Wᵀ + bias``: [N, d_in] → [N, d_out], both of the compute dtype."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A dense matrix [d_out, d_in] and a bias [d_out], or None, of the compute dtype."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return functional.linear(x, self.weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """The same in float32, whose sums are not rounded."""
        if x.dtype == torch.float32:
            return self(x)
        y = _mixed_product(x, self.weight.t())
        return y if self.bias is None else y + self.bias

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """NF4 by bitsandbytes' fused product in bfloat16, which takes both levels of absmaxes.

    Which of its kernels runs depends on the number of rows, and with it how sums are rounded.
    """

    weight: Nf4Weight
    offset: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        weight = self.weight
        if not len(x):  # no kernel can be launched for nothing
            return x.new_empty(0, weight.shape[0])
        nested = (weight.absmax, weight.nested_code, self.offset) if weight.is_nested else (None, None, None)
        scales = weight.nested_absmax if weight.is_nested else weight.absmax
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, weight.packed, list(weight.shape), scales, BLOCK_SIZE, "nf4", self.bias, *nested
        )
        return y

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """NF4, dequantized to float32 in each call."""

    weight: Nf4Weight
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return functional.linear(x, self.weight.dequantize(), self.bias)

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Widened:
    """A product in float32 of inputs in any dtype."""

    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return self.product(x.float())

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.product.num_bytes


def _mixed_product(x: Tensor, weight: Tensor) -> Tensor:
    """Of bfloat16, in float32; torch has one for CUDA alone."""
    if x.is_cuda and len(x):
        return torch.mm(x, weight, out_dtype=torch.float32)
    return x.float() @ weight.float()


def product_of(linear: Linear, dtype: torch.dtype, device: torch.device) -> Product:
    """A linear on a device.

    Raises:
        ModelError: its NF4 codes are not those that bitsandbytes' product has built in.
    """
    matrix, bias = linear.matrix, None if linear.bias is None else linear.bias.to(device, dtype)
    if isinstance(matrix, Tensor):
        return Dense(matrix.to(device, dtype), bias)
    if dtype == torch.float32:
        return Exact(_moved(matrix, device), bias)
    # Imported here: it takes seconds, and registers the product.
    from bitsandbytes.functional import get_4bit_type

    if not torch.equal(get_4bit_type("nf4", device="cpu"), matrix.code.cpu()):
        raise ModelError("the NF4 weights have a table of codes of their own; give --dtype float32")
    return Fused(_moved(matrix, device), torch.tensor(matrix.offset, device=device), bias)


def _moved(weight: Nf4Weight, device: torch.device) -> Nf4Weight:
    names = ("packed", "absmax", "nested_absmax", "code", "nested_code")
    moved = {name: getattr(weight, name).to(device) for name in names}
    return Nf4Weight(**moved, offset=weight.offset, shape=weight.shape)
