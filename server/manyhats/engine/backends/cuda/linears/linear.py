"""Products with a model's weights, whatever form these have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.linears.dense import DenseLinear, dense_linear
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear, nf4_dequantize, nf4_linear

CudaLinear = DenseLinear | Nf4Linear


@dataclass(frozen=True, slots=True, eq=False)
class LinearWorkspace:
    """What products need besides their inputs and results; one is enough for products that run one after another.

    Attributes:
        parts: float32, the sums of ranges of K.
        weights: bfloat16, the weights of one linear, decoded.
    """

    parts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, linears: Iterable[CudaLinear], max_rows: int, device: torch.device) -> LinearWorkspace:
        """As much as any of some linears needs, with up to ``max_rows`` rows."""
        num_parts = num_weights = 0
        for linear in linears:
            tiles, size = linear.tiles, linear.out_features
            num_parts = max(num_parts, tiles.splits * tiles.num_partial_rows(max_rows) * size)
            if isinstance(linear, Nf4Linear) and max_rows >= tiles.decoded_rows:
                num_weights = max(num_weights, size * linear.in_features)
        return cls(
            torch.empty(num_parts, device=device),
            torch.empty(num_weights, dtype=torch.bfloat16, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.parts.nbytes + self.weights.nbytes


def linear(x: Tensor, weights: CudaLinear, y: Tensor, workspace: LinearWorkspace) -> None:
    """``y = x W̃ᵀ + bias``; a row's bits are the same with any number of rows.

    NF4 weights are decoded as they are multiplied or, for many rows, once before that.

    Args:
        x: [M, K] bfloat16, its rows dense.
        weights: of K inputs and N outputs.
        y: [M, N] float32 or bfloat16, its rows dense; written whole.
        workspace: made for these weights and at least M rows.
    """
    if isinstance(weights, DenseLinear):
        dense_linear(x, weights, y, workspace.parts)
    elif x.shape[0] < weights.tiles.decoded_rows:
        nf4_linear(x, weights, y, workspace.parts)
    else:
        shape = (weights.out_features, weights.in_features)
        decoded = workspace.weights[: shape[0] * shape[1]].view(shape)
        nf4_dequantize(weights, decoded)
        dense_linear(x, DenseLinear(decoded, weights.bias, weights.tiles), y, workspace.parts)
