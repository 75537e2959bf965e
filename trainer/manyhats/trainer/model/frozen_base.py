"""The base's tensors as operations under autograd, made once and shared by all passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.adapters.sites import ROUTER
from manyhats.engine.model.architecture import Architecture, Block
from manyhats.engine.model.weights import BlockWeights, Linear, Weights
from manyhats.trainer.model.head import Head
from manyhats.trainer.model.linear import FrozenLinears


@dataclass(frozen=True, slots=True, eq=False)
class FrozenBase:
    """The base's operations under autograd, on the device.

    Attributes:
        dtype: of the products, and of the outputs of norms, activations and attention.
        positions: learned vectors [rows, D]; None for none.
        token_types: the same for types of tokens.
        linears: for each layer, its groups by name; layers that share their weights have the same.
        outer: linears outside the layers, but the head, by name; float32.
        head: None for an encoder.
    """

    architecture: Architecture
    dtype: torch.dtype
    embedding: Tensor
    positions: Tensor | None
    token_types: Tensor | None
    linears: list[dict[str, FrozenLinears]]
    outer: Mapping[str, FrozenLinears]
    head: Head | None

    @property
    def linear_bytes(self) -> int:
        """Resident bytes of the layers' linears."""
        sets = {id(groups): groups for groups in self.linears}
        return sum(linears.num_bytes for groups in sets.values() for linears in groups.values())


def frozen_base(
    architecture: Architecture, weights: Weights, dtype: torch.dtype, device: torch.device
) -> FrozenBase:
    """The base's weights on the device, for products in a dtype."""
    embedding = weights.embedding.to(device)
    specs = dict(zip(weights.blocks, architecture.blocks, strict=True))
    linears = {of_block: _linears(spec, of_block, dtype, device) for of_block, spec in specs.items()}
    return FrozenBase(
        architecture=architecture,
        dtype=dtype,
        embedding=embedding,
        positions=None if weights.positions is None else weights.positions.to(device),
        token_types=None if weights.token_types is None else weights.token_types.to(device),
        linears=[linears[of_block] for of_block in weights.blocks],
        outer={
            name: FrozenLinears([linear], torch.float32, device)
            for name, linear in weights.outer.items()
            if name != "lm_head"
        },
        head=None
        if architecture.head is None
        else Head(weights.outer.get("lm_head", Linear(embedding)), architecture.head, dtype, device),
    )


def _linears(
    spec: Block, weights: BlockWeights, dtype: torch.dtype, device: torch.device
) -> dict[str, FrozenLinears]:
    """A layer's groups by name."""
    return {
        group.name: FrozenLinears(
            [weights.linears[name] for name in group.names],
            torch.float32 if group.name == ROUTER else dtype,
            device,
        )
        for group in spec.groups()
    }
