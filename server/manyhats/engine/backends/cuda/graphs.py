"""Steps as graphs: hundreds of launches recorded once, and replayed by one call.

All but the sizes of a step is data on the device. So one graph serves every step that fits its shape: rows beyond the
step's are in no work, and write to a block that no sequence has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog
import torch

from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.segments import most_segments
from manyhats.engine.backends.cuda.runtime import Runtime
from manyhats.engine.backends.cuda.upload import Uploads
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.plan import StepPlan

ROWS = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 512, 32), 512)
"""Numbers of rows that graphs are made for."""
_LEAST_WIDTH = 64
_LEAST_RANK = 16
MAX_SHAPES = 256
"""That are known; half a megabyte each or so, which is not measured on a GPU."""
_MAX_FAILED = 3
"""Recordings, before no more is tried."""
MAX_COPIES = 64
"""Blocks that a step of a graph may have copied."""
_PARTS_OF_ROW = 16
_LEAST_PARTS = 1024
"""Parts of the attention that a graph has room for: so many times its rows, and at least these."""
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
        return max(_PARTS_OF_ROW * self.rows, _LEAST_PARTS)

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
    of the base model at the start, others as they come. The shape that no step had for the longest makes room. What
    cannot be recorded goes on being launched.

    Args:
        capture: records.
        runtime: of the device.

    Attributes:
        num_replays: steps that were replayed.
    """

    def __init__(self, capture: Capture, runtime: Runtime) -> None:
        self._capture = capture
        self._runtime = runtime
        self._memory: tuple[object, ...] = ()
        self._shapes: OrderedDict[Shape, _Recorded] = OrderedDict()  # the longest unused first
        self._num_failed = 0
        self.num_replays = 0

    def use(self, *memory: object) -> None:
        """Say what steps read and write besides the model's own; graphs of another are of no use."""
        is_same = len(memory) == len(self._memory)
        if not is_same or any(one is not other for one, other in zip(memory, self._memory, strict=True)):
            self._memory = memory
            self._shapes.clear()

    def uploads(self, shape: Shape) -> Uploads:
        """Through which the steps of a shape get to the device, at addresses that stay."""
        if shape not in self._shapes:
            self._shapes[shape] = _Recorded(Uploads(self._runtime, 1))
            while len(self._shapes) > MAX_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(shape)
        return self._shapes[shape].uploads

    def run(self, shape: Shape, launch: Callable[[], None]) -> None:
        """Launch a step, whose numbers went through the shape's uploads."""
        recorded = self._shapes[shape]
        if recorded.was_launched and recorded.graph is None and not recorded.has_failed:
            self._record(recorded, launch)
        recorded.was_launched = True
        if recorded.graph is None:
            launch()
            return
        recorded.graph.replay()
        self.num_replays += 1

    def _record(self, recorded: _Recorded, launch: Callable[[], None]) -> None:
        recorded.has_failed = self._num_failed >= _MAX_FAILED
        if recorded.has_failed:
            return
        try:
            recorded.graph = self._capture(launch)
        except RuntimeError as error:
            recorded.has_failed = True
            self._num_failed += 1
            _log.warning("a step cannot be recorded as a graph and will go on being launched", exc_info=error)


@dataclass(slots=True, eq=False)
class _Recorded:
    """What there is of a shape."""

    uploads: Uploads
    graph: Graph | None = None
    was_launched: bool = False
    has_failed: bool = False


class CapturingOnGpu:
    """``Capture`` by torch, on a stream of its own; the graphs share their temporary memory.

    Other threads may go on copying meanwhile.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def __call__(self, launch: Callable[[], None]) -> Graph:
        """Record."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                self._end_with(graph, launch)
        except BaseException:
            # What was begun in the pool may never be ended: others get another, and this one stays as it is.
            self._failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()
            raise
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph

    def _end_with(self, graph: torch.cuda.CUDAGraph, launch: Callable[[], None]) -> None:
        try:
            launch()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
