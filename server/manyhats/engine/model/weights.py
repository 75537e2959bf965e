"""A model's weights as frozen structures: what the checkpoint reader fills and the backends read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from manyhats.engine.model.nf4 import Nf4Weight

Matrix = Tensor | Nf4Weight
"""[out, in]: dense (float32 or bfloat16) or NF4."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """``y = x Wᵀ + bias``; ``bias`` [out] or None, in the dense dtype."""

    matrix: Matrix
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.matrix.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return int(self.matrix.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class NormWeight:
    """A norm's factors, float32."""

    weight: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeights:
    """One block: its linears and norms by the names in ``Block``, in its order."""

    linears: Mapping[str, Linear]
    norms: Mapping[str, NormWeight]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A whole model.

    Attributes:
        embedding: [V, D].
        blocks: L of them.
        final_norm: [D].
        outer: linears outside the blocks, by site name: ``lm_head`` [V, D] if the head is not tied.
    """

    embedding: Tensor
    blocks: tuple[BlockWeights, ...]
    final_norm: NormWeight
    outer: Mapping[str, Linear]

    @property
    def head(self) -> Linear:
        """The output head, tied or not."""
        return self.outer.get("lm_head") or Linear(self.embedding)

    def linears(self) -> Iterator[Linear]:
        """The linears of all blocks."""
        return (linear for block in self.blocks for linear in block.linears.values())

    def norms(self) -> Iterator[NormWeight]:
        """The norms of all blocks, and the final one."""
        yield from (norm for block in self.blocks for norm in block.norms.values())
        yield self.final_norm
