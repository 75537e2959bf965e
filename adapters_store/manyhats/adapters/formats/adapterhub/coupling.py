"""Invertible adapters (NICE): two networks on the halves of the normed embeddings, each as a bottleneck on the whole.

With x₁ the first E // 2 values of an embedding and x₂ the others, ``y₁ = x₁ + F(x₂)``, then ``y₂ = x₂ + G(y₁)``; a
network is ``W₂ act(W₀ · + b₀) + b₂``. Matrices that are zero for the other half make a bottleneck of it.

Source: Dinh et al. 2015 (arXiv:1410.8516); Pfeiffer et al. 2020 (arXiv:2005.00052).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.errors import AdapterInvalidError
from manyhats.adapters.primitives import Bottleneck, BottleneckInput
from manyhats.adapters.sites import Site

_NETWORKS = (("F", "first_coupling"), ("G", "second_coupling"))


def coupling_shapes(name: str, size: int, factor: float) -> dict[str, tuple[int, ...]]:
    """The networks' tensors, by plain name.

    Args:
        name: the adapter's.
        size: E.
        factor: half of E over the networks' own size.

    Raises:
        AdapterInvalidError: a network would have no size.
    """
    halves = size // 2, size - size // 2
    shapes: dict[str, tuple[int, ...]] = {}
    for (network, _), (d_out, d_in) in zip(_NETWORKS, (halves, halves[::-1]), strict=True):
        inner = int(d_in // factor)
        if inner < 1:
            raise AdapterInvalidError("inv_adapter_reduction_factor", f"{factor:g} leaves nothing of {d_in}")
        module = f"invertible_adapters.{name}.{network}"
        shapes |= {f"{module}.0.weight": (inner, d_in), f"{module}.0.bias": (inner,)}
        shapes |= {f"{module}.2.weight": (d_out, inner), f"{module}.2.bias": (d_out,)}
    return shapes


def lower_couplings(
    name: str, size: int, activation: str, read: Callable[[str], Tensor]
) -> tuple[Bottleneck, ...]:
    """Both networks, in the order in which they act; ``read`` gives a tensor by plain name."""
    half = size // 2
    deltas = []
    for network, place in _NETWORKS:
        module = f"invertible_adapters.{name}.{network}"
        is_first = network == "F"
        # Zeros before or behind the columns that it reads, and the rows that it adds to.
        read_by, added_to = (half, 0), (0, size - half)
        if not is_first:
            read_by, added_to = (0, size - half), (half, 0)
        deltas.append(
            Bottleneck(
                site=Site(-1, place),
                input=BottleneckInput.OUTPUT,
                down=functional.pad(read(f"{module}.0.weight"), read_by),
                down_bias=read(f"{module}.0.bias"),
                up=functional.pad(read(f"{module}.2.weight"), (0, 0, *added_to)),
                up_bias=functional.pad(read(f"{module}.2.bias"), added_to),
                activation=activation,
                scale=torch.ones(1),
            )
        )
    return tuple(deltas)
