"""A model's weights on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhats.adapters.sites import ROUTER, Site
from manyhats.engine.backends.torch.batched.linears import Dense, Product, Widened, product_of
from manyhats.engine.model.architecture import Architecture, Rope
from manyhats.engine.model.rotary import Angles, RotaryTables
from manyhats.engine.model.weights import BlockWeights, Linear, NormWeight, Weights


class DeviceWeights:
    """Linears, embeddings and tables of a model, and its norms as ``model.forward`` takes them.

    Args:
        architecture: the model's.
        weights: in host memory.
        dtype: what linears compute in.
        device: where.
    """

    def __init__(
        self, architecture: Architecture, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self._device = device
        self.embedding = weights.embedding.to(device, dtype)
        self._sets: dict[BlockWeights, dict[str, Product]] = {
            of_block: {name: self._product(name, linear) for name, linear in of_block.linears.items()}
            for of_block in weights.sets
        }
        self._linears = [self._sets[of_block] for of_block in weights.blocks]
        self.norms = self._norms(weights)
        self._outer = {
            name: self._product(name, linear) for name, linear in weights.outer.items() if name != "lm_head"
        }
        self.head = None if architecture.head is None else self._head(weights)
        self.positions = _table(weights.positions, device)
        self.token_types = _table(weights.token_types, device)
        tables = RotaryTables(architecture).tables
        self._rotary = {rope: (cos.to(device), sin.to(device)) for rope, (cos, sin) in tables.items()}

    def linear(self, site: Site) -> tuple[Product, bool]:
        """A linear, and whether its output enters the stream, which is float32."""
        if site.layer < 0:
            return self._outer[site.name], True
        return self._linears[site.layer][site.name], site.name.endswith(("o_proj", "down_proj"))

    def angles(self, positions: Tensor) -> Mapping[Rope | None, Angles]:
        """The angles of rows at positions [N], by kind of rotation."""
        return {
            rope: (cos.index_select(0, positions), sin.index_select(0, positions))
            for rope, (cos, sin) in self._rotary.items()
        }

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head, tables and norms."""
        outer = sum(product.num_bytes for product in self._outer.values())
        if self.head is not None and self.head.weight is not self.embedding:
            outer += self.head.num_bytes
        tables = [self.embedding, *(norm.weight for norm in self.norms.norms())]
        tables += [table for table in (self.positions, self.token_types) if table is not None]
        tables += [part for angles in self._rotary.values() for part in angles]
        return {
            "base": sum(product.num_bytes for of_set in self._sets.values() for product in of_set.values()),
            "embeddings": outer + sum(table.nbytes for table in tables),
        }

    def _product(self, name: str, linear: Linear) -> Product:
        """A router's results, of which the largest count, are close to one another: they are not rounded."""
        if name == ROUTER:
            return Widened(product_of(linear, torch.float32, self._device))
        return product_of(linear, self.dtype, self._device)

    def _head(self, weights: Weights) -> Dense:
        """Always dense: the embedding if it is tied."""
        head = weights.outer.get("lm_head")
        if head is None:
            return Dense(self.embedding, None)
        matrix = head.matrix if isinstance(head.matrix, Tensor) else head.matrix.dequantize()
        bias = None if head.bias is None else head.bias.to(self._device, self.dtype)
        return Dense(matrix.to(self._device, self.dtype), bias)

    def _norms(self, weights: Weights) -> Weights:
        """The same weights with the norms alone, on the device."""
        sets = {
            of_block: BlockWeights({}, {name: self._norm(each) for name, each in of_block.norms.items()})
            for of_block in weights.sets
        }
        return Weights(
            embedding=self.embedding,
            blocks=tuple(sets[of_block] for of_block in weights.blocks),
            final_norm=None if weights.final_norm is None else self._norm(weights.final_norm),
            outer={},
            embedding_norm=None if weights.embedding_norm is None else self._norm(weights.embedding_norm),
        )

    def _norm(self, norm: NormWeight) -> NormWeight:
        bias = None if norm.bias is None else norm.bias.to(self._device)
        return NormWeight(norm.weight.to(self._device), bias)


def _table(table: Tensor | None, device: torch.device) -> Tensor | None:
    return None if table is None else table.float().to(device)
