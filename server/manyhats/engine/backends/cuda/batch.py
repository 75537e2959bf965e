"""A step's plan as the kernels take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, arrays_of
from manyhats.engine.backends.cuda.attention.attend import WorkOnDevice
from manyhats.engine.backends.cuda.attention.work import Tiling, Work, work_of
from manyhats.engine.backends.cuda.graphs import Shape
from manyhats.engine.backends.cuda.upload import Uploads, Views
from manyhats.engine.backends.plan import NO_ADAPTER_ROWS, AdapterRows, StepPlan, int32
from manyhats.engine.backends.wants import Array
from manyhats.engine.model.architecture import Architecture, Attention

Sees = tuple[int | None, bool]
"""What an attention's rows see: the window, and whether what follows, too. Layers of one kind share their work."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """How the device goes through a step's attention.

    Attributes:
        tiling: how it is cut.
        num: programs that walk the items at the same time.
        max_slots: parts that there is room for.
    """

    tiling: Tiling
    num: int
    max_slots: int


@dataclass(frozen=True, slots=True, eq=False)
class OwnVocabulary:
    """Logit rows of one task that has a vocabulary of its own.

    Attributes:
        rows: [m] int64, which of the step's logit rows they are.
        index: the same on the device, int32.
        size: of the vocabulary.
        adapters: what their adapter does, with rows 0 … m − 1.
    """

    rows: Array
    index: Tensor
    size: int
    adapters: StepAdapters


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Attributes as ``StepPlan`` has them, int32 on the device, ``cells`` int64.

    Attributes:
        work: of the attention, by what its rows see.
        adapters: of all rows.
        head_adapters: of the logit rows that choose among the base's tokens.
        own: the other logit rows.
        entering: rows that enter as values, and these.
        normed: the same behind the norm of the embeddings.
        copies: [C, 2]. num_copies: [1].
    """

    num_rows: int
    token_ids: Tensor
    positions: Tensor
    cells: Tensor
    tables: Tensor
    logit_rows: Tensor
    hidden_rows: Tensor
    token_types: Tensor
    work: Mapping[Sees, WorkOnDevice]
    adapters: StepAdapters
    head_adapters: StepAdapters
    own: Sequence[OwnVocabulary]
    entering: tuple[Tensor, Tensor] | None
    normed: tuple[Tensor, Tensor] | None
    copies: Tensor
    num_copies: Tensor


def sees(attention: Attention) -> Sees:
    """What the rows of a layer see."""
    return attention.window, attention.sees_all


@dataclass(frozen=True, slots=True, eq=False)
class SentPlan:
    """A plan whose copy to the device is launched.

    Attributes:
        num_rows: what there is room for.
        there: its arrays.
        records: of the adapters.
        acting: what each group of rows with adapters does.
        own: rows and sizes of vocabularies of tasks.
        kinds: of the attention.
    """

    num_rows: int
    there: Views
    records: Tensor
    acting: Mapping[str, Acting]
    own: Sequence[tuple[AdapterRows, int]]
    kinds: Sequence[Sees]

    def batch(self) -> Batch:
        """As the kernels take it."""
        there = self.there
        adapters = {
            name: StepAdapters.placed(there.under(name), self.records, acting)
            for name, acting in self.acting.items()
        }
        return Batch(
            num_rows=self.num_rows,
            **{name: there[name] for name in _PLAIN},
            work={kind: WorkOnDevice(**there.under(f"work{kind}")) for kind in self.kinds},
            adapters=adapters["adapters"],
            head_adapters=adapters["head"],
            own=[
                OwnVocabulary(
                    each.rows.astype(np.int64), there[f"index{index}"], size, adapters[f"own{index}"]
                )
                for index, (each, size) in enumerate(self.own)
            ],
            entering=_values(there, "entering"),
            normed=_values(there, "normed"),
        )


class Plans:
    """Sends the plans of one model's steps to the device.

    Args:
        architecture: the model's.
        lanes: of the attention.
    """

    def __init__(self, architecture: Architecture, lanes: Lanes) -> None:
        self._kinds = {sees(block.attention): block.attention for block in architecture.blocks}
        self._lanes = lanes
        self._sees_all = architecture.attention.sees_all

    def send(self, plan: StepPlan, rows: AdapterRows, slots: CudaAdapterSlots, uploads: Uploads) -> SentPlan:
        """A step as it is; ``rows`` are those with an adapter."""
        head_rows, own = slots.by_vocabulary(AdapterRows.of(plan.row_slots[plan.logit_rows]))
        groups = {"adapters": rows, "head": head_rows}
        groups |= {f"own{index}": _renumbered(each) for index, (each, _) in enumerate(own)}
        arrays = self._arrays(plan, groups, self._lanes.max_slots)
        for index, (each, _) in enumerate(own):
            arrays[f"index{index}"] = each.rows
        acting = {name: slots.acting(group) for name, group in groups.items()}
        there = uploads.send(arrays)
        return SentPlan(plan.num_rows, there, slots.records, acting, own, tuple(self._kinds))

    def send_padded(
        self,
        plan: StepPlan,
        rows: AdapterRows,
        slots: CudaAdapterSlots,
        uploads: Uploads,
        shape: Shape,
        spare_cell: int,
    ) -> SentPlan:
        """A step in the room of a shape; the rows that only fill it up write to the spare cell."""
        groups = {"adapters": rows, "head": NO_ADAPTER_ROWS}
        arrays = self._arrays(plan, groups, min(shape.max_slots, self._lanes.max_slots))
        padding = np.full(shape.rows - plan.num_rows, spare_cell, np.int64)
        arrays["cells"] = np.concatenate((plan.cells, padding))
        room = shape.room(slots.num_slots)
        by_name = {name: room[last] for name in arrays if (last := name.rsplit(".", 1)[-1]) in room}
        there = uploads.send(arrays, by_name)
        acting = {"adapters": shape.acting, "head": Acting()}
        return SentPlan(shape.rows, there, slots.records, acting, (), tuple(self._kinds))

    def _arrays(self, plan: StepPlan, groups: Mapping[str, AdapterRows], max_slots: int) -> dict[str, Array]:
        arrays, lanes = _of_plan(plan), self._lanes
        for kind, attention in self._kinds.items():
            work = work_of(plan, attention, lanes.tiling, lanes.num, max_slots)
            arrays |= _named(f"work{kind}", _work(work))
        starts = plan.query_start if self._sees_all else None
        for name, rows in groups.items():
            arrays |= _named(name, arrays_of(rows, starts if name == "adapters" else None))
        return arrays


_PLAIN = (
    "token_ids",
    "positions",
    "cells",
    "tables",
    "logit_rows",
    "hidden_rows",
    "token_types",
    "copies",
    "num_copies",
)


def _of_plan(plan: StepPlan) -> dict[str, Array]:
    arrays: dict[str, Array] = {
        "token_ids": plan.token_ids,
        "positions": plan.positions,
        "cells": plan.cells,
        "tables": plan.block_tables,
        "logit_rows": plan.logit_rows,
        "hidden_rows": plan.hidden_rows,
        "token_types": plan.token_types,
        "copies": int32(plan.block_copies).reshape(-1, 2),
        "num_copies": int32([len(plan.block_copies)]),
    }
    for name, values in (("entering", plan.embeddings), ("normed", plan.normed)):
        if values is not None:
            arrays |= {f"{name}.rows": values[0], f"{name}.values": values[1]}
    return arrays


def _values(there: Views, name: str) -> tuple[Tensor, Tensor] | None:
    return (there[f"{name}.rows"], there[f"{name}.values"]) if f"{name}.rows" in there else None


def _work(work: Work) -> dict[str, Array]:
    return {
        "items": work.items,
        "num_items": int32([len(work.items)]),
        "merges": work.merges,
        "num_merges": int32([len(work.merges)]),
    }


def _named(name: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{name}.{each}": array for each, array in arrays.items()}


def _renumbered(rows: AdapterRows) -> AdapterRows:
    """The same adapters of rows from 0 on."""
    return AdapterRows(np.arange(rows.rows.size, dtype=np.int32), rows.slots, rows.num_adapters)
