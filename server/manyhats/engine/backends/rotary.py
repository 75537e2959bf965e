"""Cosines and sines of the rotary embedding, for every position that a model can have."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.engine.model.architecture import Architecture, Rope

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, [N, rotary_dim / 2] each, scaled."""


class RotaryTables:
    """The tables of a decoder's layers; layers of one kind share theirs.

    Computed once: torch's vectorized cosine may round the last elements of an array differently, and a row's
    result must not depend on its place in the batch.
    """

    def __init__(self, architecture: Architecture) -> None:
        ropes = [block.attention.rope for block in architecture.blocks]
        kinds = list(dict.fromkeys(ropes))
        self._kind_of_layer = [kinds.index(rope) for rope in ropes]
        self._tables = [_table(rope, architecture.max_context_length) for rope in kinds]

    def at(self, positions: Tensor) -> list[Angles]:
        """The angles of some rows, layer by layer.

        Args:
            positions: [N] int64.
        """
        kinds = [
            (cos.index_select(0, positions), sin.index_select(0, positions)) for cos, sin in self._tables
        ]
        return [kinds[kind] for kind in self._kind_of_layer]


def _table(rope: Rope | None, length: int) -> Angles:
    """[length, rotary_dim / 2] each; without columns where there is no RoPE."""
    rope = rope or Rope(())
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions.unsqueeze(1) * torch.tensor(rope.inv_freq, dtype=torch.float32)
    return angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling
