"""The texts of a step, as an encoder's are: all rows of a text are there, which share its gates, and know its ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.plan import AdapterRows, Ints, int32


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """The texts of a step on the device; tensors may be longer than what counts of them.

    Attributes:
        starts: [≥ B + 1] int32, each text's first row.
        items: [≥ B, 3] int32: slot, first place among the rows with an adapter, or −1, and how many rows.
        within: [≥ A, 2] int32, of each place: its row, counted from the text's first one, and the text's rows.
        num_texts: [1] int32, B.
        max_texts: of the grids.
    """

    starts: Tensor
    items: Tensor
    within: Tensor
    num_texts: Tensor
    max_texts: int

    @classmethod
    def of(cls, starts: Ints, rows: AdapterRows, device: torch.device) -> Texts:
        """Exactly these texts, copied to a device."""
        items, within = texts_of(starts, rows)
        arrays = int32(starts), items, within, int32([len(items)])
        first, cut, places, count = (torch.from_numpy(each).to(device) for each in arrays)
        return cls(first, cut, places, count, max_texts=len(items))


def texts_of(starts: Ints, rows: AdapterRows) -> tuple[Ints, Ints]:
    """``items`` and ``within`` of ``Texts``.

    Args:
        starts: [B + 1], each text's first row.
        rows: with an adapter; those of one text have the same one.
    """
    sizes = np.diff(starts)
    place_of = np.full(starts[-1], -1, np.int32)
    place_of[rows.rows] = np.arange(rows.rows.size)
    first = place_of[starts[:-1]]
    slots = np.append(rows.slots, 0)[first]  # the last one of texts without an adapter
    text = np.searchsorted(starts, rows.rows, side="right") - 1
    within = np.stack((rows.rows - starts[text], sizes[text]), axis=1)
    return int32(np.stack((slots, first, sizes), axis=1)), int32(within)
