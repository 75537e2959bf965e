"""One frozen matrix of the base, dense or in NF4, as a dense one in the compute dtype for the duration of a product."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from manyhats.engine.model.nf4 import BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Matrix

_NF4_TENSORS = ("packed", "absmax", "nested_absmax", "code", "nested_code")


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
