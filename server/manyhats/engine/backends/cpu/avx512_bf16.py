"""bitsandbytes' fused NF4 matmul for processors with AVX512-BF16: bfloat16 in and out, float32 sums.

About twice as fast as the ``linear`` kernel at many rows, since such a processor multiplies bfloat16 pairs; it
keeps the absmax in bfloat16, and so differs from the exact weights by up to 0.2 %. Used where the engine's
dtype is bfloat16, the processor has the instructions and the shape fits, and only after it was checked against
the exact kernel on the model's own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu.packing import Array
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Weight
from manyhats.engine.model.weights import Linear

_ROW_MULTIPLE = 32
_MAX_ROWS = 256
"""Rows of one call; from 512 on bitsandbytes may choose another way, and a row's result would depend on it."""

_MAX_RELATIVE_ERROR = 0.02
"""Against the exact weights, relative to the largest output; bfloat16 rounding stays under a third of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Avx512Bf16Linear:
    """One or more NF4 linears over the same input in bitsandbytes' packed layout.

    Attributes:
        weight: [out, in / 2] uint8, packed 32 rows at a time.
        absmax: [in / 64, out] bfloat16.
        code: [16] float32.
        bias: [out] float32, or None.
    """

    in_features: int
    out_features: int
    weight: Tensor
    absmax: Tensor
    code: Tensor
    bias: Array | None

    @property
    def num_bytes(self) -> int:
        """Resident bytes of weights, absmax and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return int(self.weight.numel() + 2 * self.absmax.numel() + bias)

    def __call__(self, x: Tensor) -> Tensor:
        """X Wᵀ + b: [N, in] float32 → [N, out] float32."""
        gemm = torch.ops.bitsandbytes.gemv_4bit
        shape = [self.out_features, self.in_features]
        parts = [
            gemm(rows, self.weight, shape, self.absmax, self.code, BLOCK_SIZE)
            for rows in x.to(torch.bfloat16).split(_MAX_ROWS)
        ]
        y = torch.cat(parts).float() if len(parts) > 1 else parts[0].float()
        return y if self.bias is None else y.add_(torch.from_numpy(self.bias))


def fits(parts: Sequence[Linear]) -> bool:
    """Whether the packed layout can hold these linears."""
    return all(
        isinstance(part.matrix, Nf4Weight)
        and part.matrix.is_nested
        and part.out_features % _ROW_MULTIPLE == 0
        and part.in_features % BLOCK_SIZE == 0
        for part in parts
    )


def pack(parts: Sequence[Linear]) -> Avx512Bf16Linear:
    """Packs linears that fit, side by side."""
    packed = [_pack_weight(part.matrix) for part in parts if isinstance(part.matrix, Nf4Weight)]
    has_bias = any(part.bias is not None for part in parts)
    biases = [
        np.zeros(part.out_features, np.float32) if part.bias is None else part.bias.float().numpy()
        for part in parts
    ]
    first = parts[0].matrix
    return Avx512Bf16Linear(
        in_features=parts[0].in_features,
        out_features=sum(part.out_features for part in parts),
        weight=torch.cat([weight for weight, _ in packed]),
        absmax=torch.cat([absmax for _, absmax in packed], dim=1).contiguous(),
        code=first.code if isinstance(first, Nf4Weight) else torch.empty(0),
        bias=np.concatenate(biases) if has_bias else None,
    )


def _pack_weight(weight: Nf4Weight) -> tuple[Tensor, Tensor]:
    """One matrix as [out, in / 2] codes and [in / 64, out] absmax, by bitsandbytes' own converter."""
    from bitsandbytes.functional import QuantState, _convert_weight_packed_for_cpu

    nested = QuantState(
        absmax=weight.nested_absmax,
        code=weight.nested_code,
        blocksize=NESTED_BLOCK_SIZE,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=weight.code,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(weight.offset),
        state2=nested,
    )
    codes, state = _convert_weight_packed_for_cpu(weight.packed, state)
    return codes, state.absmax


def relative_error(packed: Avx512Bf16Linear, exact: Array) -> float:
    """Largest deviation from exact outputs for the check's input, relative to the largest of them."""
    difference = packed(check_input(packed.in_features)).numpy() - exact
    return float(np.abs(difference).max() / max(float(np.abs(exact).max()), 1e-30))


def is_close_enough(error: float) -> bool:
    """Whether a relative error is bfloat16's rounding and nothing more; NaN is not."""
    return error <= _MAX_RELATIVE_ERROR


def check_input(in_features: int) -> Tensor:
    """Three rows of fixed pseudo-random input, [3, in] float32."""
    return torch.randn((3, in_features), generator=torch.Generator().manual_seed(0))
