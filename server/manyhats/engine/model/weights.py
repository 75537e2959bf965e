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
    """A norm's factors, and what is added afterwards, or None; float32, of one shape."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeights:
    """One block: its linears and norms by the names in ``Block``, in its order."""

    linears: Mapping[str, Linear]
    norms: Mapping[str, NormWeight]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A whole model.

    Attributes:
        embedding: [V, E].
        blocks: L of them; layers that share their weights have the same one.
        final_norm: [D]; None for none.
        outer: linears outside the blocks, by name: ``lm_head`` [V, E] if the head is not the embedding alone, the
            projections [D, E] and [E, D] that an architecture has where E is not D, and ``pooler`` [D, D] if an
            encoder's files have one.
        pooler_norm: of its output; None for none.
        positions: learned vectors [rows, D]; None for none.
        token_types: the same for types of tokens.
        embedding_norm: of the embeddings' sum; None for none.
    """

    embedding: Tensor
    blocks: tuple[BlockWeights, ...]
    final_norm: NormWeight | None
    outer: Mapping[str, Linear]
    positions: Tensor | None = None
    token_types: Tensor | None = None
    embedding_norm: NormWeight | None = None
    pooler_norm: NormWeight | None = None

    @property
    def head(self) -> Linear:
        """The output head, tied or not."""
        return self.outer.get("lm_head") or Linear(self.embedding)

    @property
    def sets(self) -> tuple[BlockWeights, ...]:
        """The blocks, each once where layers share them, in the order of their first use."""
        return tuple(dict.fromkeys(self.blocks))

    def linears(self) -> Iterator[Linear]:
        """The linears of all blocks."""
        return (linear for block in self.sets for linear in block.linears.values())

    def norms(self) -> Iterator[NormWeight]:
        """The norms of all blocks, and the final one."""
        if self.embedding_norm is not None:
            yield self.embedding_norm
        yield from (norm for block in self.sets for norm in block.norms.values())
        if self.final_norm is not None:
            yield self.final_norm
