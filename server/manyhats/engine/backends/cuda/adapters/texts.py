"""The texts of a step, as an encoder's are: all rows of a text are there, which share its gates, and know its ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
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
    def placed(cls, there: Mapping[str, Tensor]) -> Texts:
        """What ``arrays_of_texts`` gives, on the device."""
        return cls(
            starts=there["starts"],
            items=there["items"],
            within=there["within"],
            num_texts=there["num_texts"],
            max_texts=there["items"].shape[0],
        )


def arrays_of_texts(starts: Ints, rows: AdapterRows) -> dict[str, Ints]:
    """The texts of a step as ``Texts`` names what it has of them.

    Args:
        starts: [B + 1] int32, each text's first row.
        rows: with an adapter; those of one text have the same one.
    """
    sizes = np.diff(starts)
    place_of = np.full(starts[-1], -1, np.int32)
    place_of[rows.rows] = np.arange(rows.rows.size)
    first = place_of[starts[:-1]]
    slots = np.append(rows.slots, 0)[first]  # the last one of texts without an adapter
    text = np.searchsorted(starts, rows.rows, side="right") - 1
    return {
        "starts": starts,
        "items": int32(np.stack((slots, first, sizes), axis=1)),
        "within": int32(np.stack((rows.rows - starts[text], sizes[text]), axis=1)),
        "num_texts": int32([sizes.size]),
    }
