"""A step's rows with adapters as the kernels read them, and the memory in which they leave what others go on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.segments import segments_of
from manyhats.engine.backends.cuda.adapters.texts import Texts, arrays_of_texts
from manyhats.engine.backends.cuda.record import EXPERT_MEMBERS, GATES
from manyhats.engine.backends.plan import AdapterRows, Ints, int32

RANK_TILE = 16
"""Ranks that a program takes together."""
INPUT_TILE = 128
"""Inputs that a program takes at a time."""
SCALED_ROWS = 256
"""Rows that are taken together where one linear of several has an input of its own."""
_MAX_SPLITS = 8
_LEAST_SPLIT = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What the kernels leave for each other; the same memory for every place.

    Attributes:
        inside: float32, at least splits · rows · parts · ranks values of any launch.
        read: bfloat16, at least rows · D values: what bottlenecks read.
        found: float32, as many: what bottlenecks give.
        gates: [rows, GATES] float32, of a place's gates.
        prefix_gates: [texts, 2] float32, of a layer's KV prefixes: what multiplies their keys and their values.
        scaled: bfloat16, at least ``SCALED_ROWS`` · inputs values of any group: what one linear of several reads.
        outputs: float32, or twice as many bfloat16: at least ``SCALED_ROWS`` · outputs values of any group.
    """

    inside: Tensor
    read: Tensor
    found: Tensor
    gates: Tensor
    prefix_gates: Tensor
    scaled: Tensor
    outputs: Tensor

    @classmethod
    def of(
        cls, num_rows: int, layout: RecordLayout, largest: LargestSizes, device: torch.device
    ) -> Workspace:
        """For steps of so many rows."""

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        groups = layout.groups.values()
        widest = max(size for _, size in layout.architecture.stream_places().values())
        num_scaled = min(num_rows, SCALED_ROWS)
        return cls(
            inside=empty(_num_inside(layout, largest) * RANK_TILE * num_rows),
            read=empty(num_rows * widest, dtype=torch.bfloat16),
            found=empty(num_rows * widest),
            gates=empty(num_rows, GATES),
            prefix_gates=empty(num_rows, 2),
            scaled=empty(num_scaled * max(group.d_in for group in groups), dtype=torch.bfloat16),
            outputs=empty(num_scaled * max(group.d_out for group in groups)),
        )

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def _num_inside(layout: RecordLayout, largest: LargestSizes) -> int:
    """Tiles of ranks that a row has at a time."""
    places, experts = layout.architecture.stream_places().values(), layout.experts
    linears = [split_of(group.d_in)[0] * len(group.members) for group in layout.groups.values()]
    linears += [split_of(layout.head_inputs)[0]]
    linears += [] if experts is None else [experts.num_per_row * (len(EXPERT_MEMBERS) - 1)]
    bottlenecks = [split_of(size)[0] for _, size in places]
    return max(max(linears) * rank_tiles(largest.rank), max(bottlenecks) * rank_tiles(largest.bottleneck))


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
        texts: of an encoder; None for a decoder's step, in which nothing acts that knows them.
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
    texts: Texts | None = None

    @classmethod
    def of(
        cls, rows: AdapterRows, records: Tensor, acting: Acting, starts: Ints | None = None
    ) -> StepAdapters:
        """Exactly these rows, and the texts whose first rows are given, copied to the records' device."""
        arrays = arrays_of(rows, starts)
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
            texts=Texts.placed(there) if "starts" in there else None,
        )

    @property
    def of_rows(self) -> tuple[Tensor, ...]:
        """What kernels with a program a row take: rows, slots, their number, and the records."""
        return self.rows, self.slots, self.num_rows, self.records

    def within(self, name: str) -> tuple[Tensor, bool]:
        """Where rows are in their texts, and whether that matters to bottlenecks at a place."""
        if name not in self.acting.ends:
            return self.rows, False
        assert self.texts is not None, "the ends of texts are known in an encoder's step"
        return self.texts.within, True


def arrays_of(rows: AdapterRows, starts: Ints | None = None) -> dict[str, Ints]:
    """Rows with adapters as ``StepAdapters`` names them, and as ``Texts`` does where each text's first row is given."""
    segments = segments_of(rows)
    texts = {} if starts is None else arrays_of_texts(starts, rows)
    return texts | {
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
