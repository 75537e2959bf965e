"""Linears whose weights are bfloat16, on a device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from manyhats.engine.backends.cuda.linears.launch import launch
from manyhats.engine.backends.cuda.linears.tiles import LinearTiles, bucket_of
from manyhats.engine.backends.cuda.triton.dense_linear import dense_linear as kernel


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """One or more linears over the same input, side by side.

    Attributes:
        weight: [N, K] bfloat16.
        bias: [N] float32; None for none.
        tiles: of products with it.
    """

    weight: Tensor
    bias: Tensor | None
    tiles: LinearTiles

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.weight.shape[1])

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


def dense_linear(x: Tensor, linear: DenseLinear, y: Tensor, parts: Tensor) -> None:
    """``y = x Wᵀ + bias``, summed in float32, K ascending: the bits of ``nf4_linear`` where the weights are equal.

    Args:
        x: [M, K] bfloat16, its rows dense.
        linear: of K inputs and N outputs.
        y: [M, N] float32 or bfloat16, its rows dense; written whole.
        parts: workspace, float32 [≥ splits · M · N] for as many rows as ``tiles.num_partial_rows``.
    """
    tile = linear.tiles.dense[bucket_of(x.shape[0])]
    launch(kernel, x, (linear.weight,), linear.bias, y, parts, linear.tiles, tile)
