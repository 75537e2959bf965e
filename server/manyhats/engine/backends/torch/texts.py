"""What a step's rows share, or are, as rows of whole texts: gates, and ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import Gate, TextEnds
from manyhats.engine.backends.plan import Ints


class Texts:
    """The texts of one step.

    Args:
        starts: [B + 1], each text's first row.
        product: rows times a gate's weight, with its bias, as the backend multiplies.
    """

    def __init__(self, starts: Ints, product: Callable[[Tensor, Gate], Tensor]) -> None:
        self._starts = starts
        self._product = product
        self._gates: dict[tuple[int, int], Tensor] = {}

    def gate(self, gate: Gate | None, rows: Tensor, read: Callable[[], Tensor]) -> float | Tensor:
        """The factors of rows' texts, [R, n]; ``read`` gives the inputs of all rows."""
        if gate is None:
            return 1.0
        texts = np.searchsorted(self._starts, rows.numpy(), side="right") - 1
        return torch.stack([self.gate_of_text(gate, text, read) for text in texts.tolist()])

    def gate_of_text(self, gate: Gate, text: int, read: Callable[[], Tensor]) -> Tensor:
        """Each gate reads in one place, where its text's rows share what it gives."""
        key = id(gate), text
        if key not in self._gates:
            first, last = self._starts[text : text + 2].tolist()
            opened = torch.sigmoid(self._product(read()[first:last], gate))
            self._gates[key] = opened.double().mean(0).float()
        return self._gates[key]

    def ends(self, ends: TextEnds, rows: Tensor, size: int) -> Tensor:
        """What rows have of a bottleneck: [R, b], 1 or 0."""
        mask = torch.zeros(len(rows), size)
        starts = self._starts
        for index, row in enumerate(rows.tolist()):
            text = int(np.searchsorted(starts, row, side="right")) - 1
            first, last = starts[text : text + 2].tolist()
            own = ends.part(row - first, last - first, size)
            mask[index, own.start : own.stop] = 1.0
        return mask
