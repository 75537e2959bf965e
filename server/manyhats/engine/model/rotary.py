"""Cosines and sines of the rotary embedding, for every position a model can have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhats.engine.model.architecture import Architecture, Rope

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, [N, rotary_dim / 2] each, scaled."""


class RotaryTables:
    """The tables of a decoder's layers; layers of the same kind share them.

    Attributes:
        tables: kind of rotation → its table, [positions, rotary_dim / 2] each.

    Computed once: torch's vectorized cosine may round the last elements of an array differently, and a row's
    result must not depend on its place in the batch.
    """

    def __init__(self, architecture: Architecture) -> None:
        kinds = dict.fromkeys(block.attention.rope for block in architecture.blocks)
        self.tables = {rope: _table(rope, architecture.max_context_length) for rope in kinds}

    def at(self, positions: Tensor) -> Mapping[Rope | None, Angles]:
        """The angles of some rows, by kind of rotation; without columns if there is none.

        Args:
            positions: [N] int64.
        """
        return {
            rope: (cos.index_select(0, positions), sin.index_select(0, positions))
            for rope, (cos, sin) in self.tables.items()
        }


def _table(rope: Rope | None, length: int) -> Angles:
    """[length, rotary_dim / 2] each."""
    rope = rope or Rope(())
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions.unsqueeze(1) * torch.tensor(rope.inv_freq, dtype=torch.float32)
    return angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling
