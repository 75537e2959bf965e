"""A step's rows with adapters as the kernels read them, and the memory in which they leave what others go on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.segments import segments_of
from manyhats.engine.backends.plan import AdapterRows, Ints, int32

RANK_TILE = 16
"""Ranks that a program takes together."""
INPUT_TILE = 128
"""Inputs that a program takes at a time."""
_MAX_SPLITS = 8
_LEAST_SPLIT = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What the kernels leave for each other; the same memory for every place.

    Attributes:
        inside: float32, at least splits · rows · parts · ranks values of any launch.
        read: [rows, D] bfloat16, what bottlenecks read.
        found: [rows, D] float32, what bottlenecks give.
    """

    inside: Tensor
    read: Tensor
    found: Tensor

    @classmethod
    def of(
        cls, num_rows: int, layout: RecordLayout, largest: LargestSizes, device: torch.device
    ) -> Workspace:
        """For steps of so many rows."""
        hidden_size = layout.architecture.hidden_size
        linears = (
            split_of(group.d_in)[0] * len(group.members) * rank_tiles(largest.rank)
            for group in layout.groups.values()
        )
        others = (
            split_of(hidden_size)[0] * rank_tiles(largest.bottleneck),
            split_of(layout.head_inputs)[0] * rank_tiles(largest.rank),
        )
        return cls(
            torch.empty(max(*linears, *others) * RANK_TILE * num_rows, device=device),
            torch.empty(num_rows, hidden_size, dtype=torch.bfloat16, device=device),
            torch.empty(num_rows, hidden_size, device=device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class StepAdapters:
    """The rows of a step that have an adapter.

    The tensors may be longer than the step needs; how much of them counts is read on the device. The numbers are those
    of the grids, which must reach that far.

    Attributes:
        records: [slots, words] int64.
        rows: [≥ A] int32, sorted by slot. slots: [≥ A] int32, the slot of each.
        segments: [≥ S, 3] int32: slot, first place among the rows, size.
        num_rows: [1] int32, A. num_segments: [1] int32, S.
        max_rows: of the grids. max_segments: likewise.
        acting: what the adapters do, or more.
    """

    records: Tensor
    rows: Tensor
    slots: Tensor
    segments: Tensor
    num_rows: Tensor
    num_segments: Tensor
    max_rows: int
    max_segments: int
    acting: Acting

    @classmethod
    def of(cls, rows: AdapterRows, records: Tensor, acting: Acting) -> StepAdapters:
        """Exactly these rows, copied to the records' device."""
        arrays = arrays_of(rows)
        return cls.placed(
            {name: torch.from_numpy(each).to(records.device) for name, each in arrays.items()},
            records,
            acting,
        )

    @classmethod
    def placed(cls, there: Mapping[str, Tensor], records: Tensor, acting: Acting) -> StepAdapters:
        """What ``arrays_of`` gives, on the device; the grids are for all that there is room for."""
        return cls(
            records=records,
            rows=there["rows"],
            slots=there["slots"],
            segments=there["segments"],
            num_rows=there["num_rows"],
            num_segments=there["num_segments"],
            max_rows=there["rows"].shape[0],
            max_segments=there["segments"].shape[0],
            acting=acting,
        )


def arrays_of(rows: AdapterRows) -> dict[str, Ints]:
    """Rows with adapters as ``StepAdapters`` names them."""
    segments = segments_of(rows)
    return {
        "rows": rows.rows,
        "slots": rows.slots,
        "segments": segments,
        "num_rows": int32([rows.rows.size]),
        "num_segments": int32([len(segments)]),
    }


def rank_tiles(rank: int) -> int:
    """Tiles of ranks."""
    return -(-rank // RANK_TILE)


def split_of(num_inputs: int) -> tuple[int, int]:
    """How many ranges a sum over inputs is cut into, and the size of each.

    Few rows would leave most of a device idle otherwise. It follows from the number of inputs alone.
    """
    size = max(_LEAST_SPLIT, -(-num_inputs // (_MAX_SPLITS * INPUT_TILE)) * INPUT_TILE)
    return -(-num_inputs // size), size
