"""What the rows of a whole text share, or are: gates, and ends. Only encoders have all rows of a text in one step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import Gate, TextEnds
from manyhats.engine.backends.plan import Ints, int32
from manyhats.engine.backends.torch.batched.rows import Rows
from manyhats.engine.backends.torch.upload import uploaded, uploaded_ints


class DeviceTexts:
    """The texts of one step.

    Args:
        starts: [B + 1], each text's first row.
        device: of the rows.
    """

    def __init__(self, starts: Ints, device: torch.device) -> None:
        self._starts = starts
        self._device = device
        self._gates: dict[tuple[int, int], Tensor] = {}
        self._ends: dict[tuple[int, TextEnds, int], tuple[Rows, Tensor]] = {}

    def gate(self, gate: Gate | None, rows: Rows, read: Callable[[], Tensor]) -> float | Tensor:
        """The factors of rows' texts, [R, n]; ``read`` gives the inputs of all rows."""
        if gate is None:
            return 1.0
        texts, counts = np.unique(self._texts_of(rows), return_counts=True)
        each = [self.gate_of_text(gate, text, read) for text in texts.tolist()]
        return torch.cat([one.expand(count, -1) for one, count in zip(each, counts.tolist(), strict=True)])

    def gate_of_text(self, gate: Gate, text: int, read: Callable[[], Tensor]) -> Tensor:
        """[n]; each gate reads in one place, where its text's rows share what it gives."""
        key = id(gate), text
        if key not in self._gates:
            first, last = self._starts[text : text + 2].tolist()
            opened = torch.sigmoid(read()[first:last].float() @ gate.weight.T + gate.bias)
            self._gates[key] = opened.mean(0)
        return self._gates[key]

    def ends(self, ends: TextEnds, rows: Rows, size: int) -> tuple[Rows, Tensor]:
        """The rows that have a part of a bottleneck, and what each has: [R, b], 1 or 0."""
        key = id(rows), ends, size
        if key not in self._ends:
            mask = np.zeros((rows.host.size, size), np.float32)
            for index, (row, text) in enumerate(zip(rows.host, self._texts_of(rows), strict=True)):
                first, last = self._starts[text : text + 2]
                own = ends.part(int(row - first), int(last - first), size)
                mask[index, own.start : own.stop] = 1.0
            kept = mask.any(1)
            host = rows.host[kept]
            (index_of,) = uploaded_ints([host], self._device)
            self._ends[key] = Rows(host, index_of), uploaded(torch.from_numpy(mask[kept]), self._device)
        return self._ends[key]

    def _texts_of(self, rows: Rows) -> Ints:
        return int32(np.searchsorted(self._starts, rows.host, side="right") - 1)
