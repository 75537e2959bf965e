"""Steps as graphs: hundreds of launches recorded once, and replayed by one call.

All but the sizes of a step is data on the device. So one graph serves every step that fits its shape: rows beyond the
step's are in no work, and write to a block that no sequence has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog
import torch

from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.segments import most_segments
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.plan import StepPlan

ROWS = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 512, 32), 512)
"""Numbers of rows that graphs are made for."""
_LEAST_WIDTH = 64
_LEAST_RANK = 16
_MAX_SHAPES = 256
MAX_COPIES = 64
"""Blocks that a step of a graph may have copied."""
_PARTS_OF_ROW = 16
"""Parts of the attention that a graph has room for, times its rows."""
_log = structlog.get_logger(__name__)


class Graph(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Launch them again."""
        ...


Capture = Callable[[Callable[[], None]], Graph]
"""Records what a function launches, which is not run then.

Raises:
    RuntimeError: something cannot be recorded.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph has room for.

    Attributes:
        rows: of the step, and sequences at most.
        logit_rows: rows whose logits are found.
        width: blocks of a sequence.
        acting: what adapters do, or more.
    """

    rows: int
    logit_rows: int
    width: int
    acting: Acting

    @classmethod
    def of(cls, plan: StepPlan, acting: Acting) -> Shape | None:
        """The least that a step fits; None if it has what no graph knows."""
        rows, logit_rows = _bucket(plan.num_rows), _bucket(plan.logit_rows.size)
        has_more = (
            plan.embeddings is not None
            or plan.normed is not None
            or plan.hidden_rows.size
            or plan.token_types.size
            or acting.changes_head
            or len(plan.block_copies) > MAX_COPIES
        )
        if has_more or rows is None or logit_rows is None:
            return None
        return cls(rows, logit_rows, _power(plan.block_tables.shape[1], _LEAST_WIDTH), acting.rounded(_rank))

    @property
    def max_slots(self) -> int:
        """Parts of the attention."""
        return _PARTS_OF_ROW * self.rows

    def room(self, num_slots: int) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a batch has, by name; ``num_slots`` adapters there may be."""
        rows, segments = self.rows, most_segments(self.rows, num_slots)
        return {
            "token_ids": (rows,),
            "positions": (rows,),
            "cells": (rows,),
            "tables": (rows, self.width),
            "logit_rows": (self.logit_rows,),
            "copies": (MAX_COPIES, 2),
            "items": (rows + self.max_slots, 8),
            "merges": (rows, 4),
            "rows": (rows,),
            "slots": (rows,),
            "segments": (segments, 3),
        }


def decode_rows(limits: Limits) -> Sequence[int]:
    """The numbers of rows that steps of one token a sequence are recorded for at the start, the largest first."""
    most = _bucket(limits.max_sequences) or ROWS[-1]
    return [rows for rows in reversed(ROWS) if rows <= min(most, limits.max_rows)]


def decode_plan(num_rows: int) -> StepPlan:
    """A token of each of some sequences of the base model, all in the first cell of an empty cache."""
    zeros = np.zeros(num_rows, np.int32)
    return StepPlan(
        token_ids=zeros,
        positions=zeros,
        cells=zeros.astype(np.int64),
        query_start=np.arange(num_rows + 1, dtype=np.int32),
        context_len=zeros + 1,
        block_tables=zeros[:, None],
        row_slots=zeros,
        logit_rows=np.arange(num_rows, dtype=np.int32),
    )


def _bucket(num_rows: int) -> int | None:
    return next((rows for rows in ROWS if num_rows <= rows), None)


def _power(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _rank(rank: int) -> int:
    return _power(rank, _LEAST_RANK) if rank else 0


class Graphs:
    """The graphs of one model, by shape.

    A shape's first step is launched as it is, which compiles kernels; at its second the graph is recorded: decode steps
    of the base model at the start, others as they come. What cannot be recorded goes on being launched.

    Args:
        capture: records.

    Attributes:
        num_replays: steps that were replayed.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._memory: tuple[object, ...] = ()
        self._graphs: dict[Shape, Graph | None] = {}  # None: was launched once, or cannot be recorded
        self._failed: set[Shape] = set()
        self.num_replays = 0

    def use(self, *memory: object) -> None:
        """Say what steps read and write besides the model's own; graphs of another are of no use."""
        if (
            any(one is not other for one, other in zip(memory, self._memory, strict=False))
            or not self._memory
        ):
            self._memory = memory
            self._graphs.clear()
            self._failed.clear()

    def has_room_for(self, shape: Shape) -> bool:
        """Whether it is one of those known, or there is room for another."""
        return shape in self._graphs or len(self._graphs) < _MAX_SHAPES

    def run(self, shape: Shape, launch: Callable[[], None]) -> None:
        """Launch a step, whose numbers are at the addresses that are this shape's."""
        graph = self._graphs.get(shape)
        if graph is None and shape in self._graphs and shape not in self._failed:
            graph = self._recorded(shape, launch)
        if graph is not None:
            graph.replay()
            self.num_replays += 1
            return
        self._graphs.setdefault(shape, None)
        launch()

    def _recorded(self, shape: Shape, launch: Callable[[], None]) -> Graph | None:
        try:
            graph = self._graphs[shape] = self._capture(launch)
        except RuntimeError as error:
            self._failed.add(shape)
            _log.warning("a step cannot be recorded as a graph and will go on being launched", exc_info=error)
            return None
        return graph


class CapturingOnGpu:
    """``Capture`` by torch, on a stream of its own; the graphs share their temporary memory.

    Other threads may go on copying meanwhile.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Callable[[], None]) -> Graph:
        """Record."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph
