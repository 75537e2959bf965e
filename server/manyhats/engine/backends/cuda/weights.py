"""A model's weights on the device, as the kernels read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from manyhats.adapters.sites import ROUTER
from manyhats.engine.backends.cuda.experts.linear import ExpertLinears
from manyhats.engine.backends.cuda.experts.mixture import Mixture, pack_mixture
from manyhats.engine.backends.cuda.linears.dense import DenseLinear
from manyhats.engine.backends.cuda.linears.linear import CudaLinear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.model.architecture import Architecture, Block, Rope
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.rotary import Angles, RotaryTables
from manyhats.engine.model.weights import BlockWeights, Linear, NormWeight, Weights

PROJECTIONS = ("embedding_projection", "head_projection")
"""Linears outside the layers, but for the head, by their names in ``Weights.outer``."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer: its groups of linears, each as one, its norms, by name, and its mixture of experts, if it has one."""

    linears: Mapping[str, CudaLinear]
    norms: Mapping[str, NormWeight]
    mixture: Mixture | None = None

    @property
    def num_bytes(self) -> int:
        """Of its linears."""
        experts = 0 if self.mixture is None else self.mixture.num_bytes
        return experts + sum(linear.num_bytes for linear in self.linears.values())


class CudaWeights:
    """Linears, embeddings, norms and tables of a model.

    Args:
        architecture: the model's.
        weights: in host memory.
        sm: compute capability of the device, such as 90.
        device: where they go.

    Attributes:
        embedding: [V, E] bfloat16.
        head: the output head; None for an encoder.
        layers: L of them; those that share their weights have the same one.
        outer: those of ``PROJECTIONS`` that there are.
        final_norm: None for none. embedding_norm: likewise.
        positions: learned vectors [rows, D] float32; None for none. token_types: likewise.
        rotary: cosines and sines by kind of rotation.

    Raises:
        ModelError: linears of a layer do not go together, or experts have biases.
    """

    def __init__(self, architecture: Architecture, weights: Weights, sm: int, device: torch.device) -> None:
        self._sm = sm
        self._device = device
        self.embedding = weights.embedding.to(device, torch.bfloat16)
        sets: dict[BlockWeights, LayerWeights] = {}
        for spec, of_block in zip(architecture.blocks, weights.blocks, strict=True):
            if of_block not in sets:
                sets[of_block] = self._layer(spec, of_block)
        self.layers = [sets[of_block] for of_block in weights.blocks]
        self._sets = tuple(sets.values())
        self.outer = {
            name: self._packed(name, linear) for name, linear in weights.outer.items() if name in PROJECTIONS
        }
        self.head = None if architecture.head is None else self._head(weights)
        self.final_norm = self._norm(weights.final_norm)
        self.embedding_norm = self._norm(weights.embedding_norm)
        self.positions = None if weights.positions is None else weights.positions.float().to(device)
        self.token_types = None if weights.token_types is None else weights.token_types.float().to(device)
        tables = RotaryTables(architecture).tables
        self.rotary: Mapping[Rope | None, Angles] = {
            rope: (cos.to(device), sin.to(device)) for rope, (cos, sin) in tables.items()
        }

    def linears(self) -> Iterator[CudaLinear]:
        """All but experts', each once."""
        for layer in self._sets:
            yield from layer.linears.values()
        yield from self.outer.values()
        if self.head is not None:
            yield self.head

    def experts(self) -> Iterator[ExpertLinears]:
        """Those of all mixtures, each once."""
        for layer in self._sets:
            if layer.mixture is not None:
                yield from (layer.mixture.first, layer.mixture.down)

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head, norms and tables."""
        tables = [self.embedding, *(part for angles in self.rotary.values() for part in angles)]
        tables += [table for table in (self.positions, self.token_types) if table is not None]
        norms = [norm for layer in self._sets for norm in layer.norms.values()]
        norms += [norm for norm in (self.final_norm, self.embedding_norm) if norm is not None]
        for norm in norms:
            tables += [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
        outer = sum(linear.num_bytes for linear in self.outer.values())
        if self.head is not None and self.head.weight is not self.embedding:
            outer += self.head.num_bytes
        return {
            "base": sum(layer.num_bytes for layer in self._sets),
            "embeddings": outer + sum(table.nbytes for table in tables),
        }

    def _layer(self, spec: Block, weights: BlockWeights) -> LayerWeights:
        linears = {
            group.name: pack_linear(
                group.name, [weights.linears[name] for name in group.names], self._sm, self._device
            )
            for group in spec.shared_groups()
            if group.name != ROUTER
        }
        norms = {name: self._moved(norm) for name, norm in weights.norms.items()}
        if spec.feed_forward.experts is None:
            return LayerWeights(linears, norms)
        return LayerWeights(linears, norms, pack_mixture(spec, weights.linears, self._sm, self._device))

    def _packed(self, name: str, linear: Linear) -> CudaLinear:
        return pack_linear(name, [linear], self._sm, self._device)

    def _head(self, weights: Weights) -> DenseLinear:
        """Always dense: the embedding if it is tied."""
        linear = weights.outer.get("lm_head") or Linear(self.embedding)
        if isinstance(linear.matrix, Nf4Weight):
            linear = Linear(linear.matrix.dequantize(), linear.bias)
        head = self._packed("lm_head", linear)
        assert isinstance(head, DenseLinear)
        return head

    def _norm(self, norm: NormWeight | None) -> NormWeight | None:
        return None if norm is None else self._moved(norm)

    def _moved(self, norm: NormWeight) -> NormWeight:
        bias = None if norm.bias is None else norm.bias.to(self._device)
        return NormWeight(norm.weight.to(self._device), bias)
