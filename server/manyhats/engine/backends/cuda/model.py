"""A model on CUDA: its weights, the memory that its steps work in, and its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.attention.cache import CudaKVCache
from manyhats.engine.backends.cuda.attention.work import Tiling
from manyhats.engine.backends.cuda.batch import Batch, Lanes, Plans
from manyhats.engine.backends.cuda.buffers import Buffers
from manyhats.engine.backends.cuda.choosing.choose import Choosing
from manyhats.engine.backends.cuda.choosing.logits import (
    DeviceLogits,
    DevicePending,
    Finisher,
    on_device,
)
from manyhats.engine.backends.cuda.ends import Ends
from manyhats.engine.backends.cuda.failures import launching
from manyhats.engine.backends.cuda.graphs import Capture, Graphs, Shape, decode_plan, decode_rows
from manyhats.engine.backends.cuda.layers import Layers
from manyhats.engine.backends.cuda.linears.tiles import ROW_BUCKETS
from manyhats.engine.backends.cuda.runtime import Runtime
from manyhats.engine.backends.cuda.self_test import check_experts, check_linears
from manyhats.engine.backends.cuda.upload import Uploads
from manyhats.engine.backends.cuda.weights import CudaWeights
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.own_logits import OwnRows, PendingParts, Vocabularies
from manyhats.engine.backends.plan import AdapterRows, StepPlan
from manyhats.engine.backends.wants import Wants
from manyhats.engine.backends.warmup import run_one
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress

_MAX_SLOTS = 2048
"""Parts of the attention that there is room for: longer contexts of more rows are not split."""
_TOKENS = 4096
"""By which the room for a vocabulary grows."""
_COPYING = 64
"""Programs that copy blocks, for each layer."""


@dataclass(frozen=True, slots=True)
class Device:
    """What is run on.

    Attributes:
        runtime: its streams, events and copies.
        sm: compute capability, such as 90.
        num_processors: that run programs side by side.
    """

    runtime: Runtime
    sm: int
    num_processors: int

    @property
    def torch(self) -> torch.device:
        """Its name."""
        return self.runtime.device


class CudaModel:
    """``Model`` by the kernels of ``triton``.

    Args:
        architecture: what is computed.
        weights: in host memory.
        device: where.
        limits: of steps.
        largest: of adapters.
        capture: records graphs; None to launch each step.

    Raises:
        ModelError: linears of a layer do not go together, or experts have biases.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        device: Device,
        limits: Limits,
        largest: LargestSizes,
        capture: Capture | None = None,
    ) -> None:
        self.architecture = architecture
        self._limits = limits
        self.weights = CudaWeights(architecture, weights, device.sm, device.torch)
        tiling = Tiling.of(architecture.attention)
        self._lanes = Lanes(tiling, max(1, 2 * device.num_processors // tiling.head_tiles), _MAX_SLOTS)
        self._layout = RecordLayout(architecture)
        self._buffers = Buffers.of(
            architecture,
            self.weights.linears(),
            limits.max_rows,
            limits.max_choices,
            _MAX_SLOTS,
            largest,
            device.torch,
        )
        self._ends = Ends(architecture, self.weights, self._layout, self._buffers)
        self._plans = Plans(architecture, self._lanes)
        self._runtime = device.runtime
        self._uploads = Uploads(device.runtime)
        self._graphs = None if capture is None else Graphs(capture, device.runtime)
        vocab_size = 0 if architecture.head is None else architecture.vocab_size
        self._finishers = _Finishers(device.runtime, limits, vocab_size)

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears; embedding, head and norms; what steps work in."""
        return {**self.weights.num_bytes, "workspace": self._buffers.num_bytes + self._finishers.num_bytes}

    def warm_up(self, cache: CudaKVCache, adapters: CudaAdapterSlots, slot: int, progress: Progress) -> None:
        """Compiles kernels, proves that linears are right and the model runs, and records the base's decode steps."""
        check_linears(self.weights.linears(), self._buffers.linear, self._limits.max_rows)
        check_experts(self.weights.experts(), self._limits.max_rows)
        if self._runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # recorded steps have memory of their own
        run_one(self, cache, adapters, slot)
        if self._graphs is not None and self.architecture.head is not None:
            for rows in decode_rows(self._limits):
                for _ in range(2):  # launched, then recorded
                    self.forward(decode_plan(rows), cache, adapters)
            for rows in ROW_BUCKETS:  # whose linears are compiled apart
                if rows <= self._limits.max_rows:
                    self.forward(decode_plan(rows), cache, adapters)

    def forget(self) -> None:
        """Give back what belongs to a cache and slots that are gone."""
        if self._graphs is not None:
            self._graphs.use()

    @torch.inference_mode()
    def forward(self, plan: StepPlan, cache: CudaKVCache, adapters: CudaAdapterSlots) -> CudaLogits:
        """Launches a step, which writes its keys and values."""
        if plan.num_rows > self._limits.max_rows:
            raise ValueError(f"a step of {plan.num_rows} rows, and memory for {self._limits.max_rows}")
        with launching(self._runtime):
            rows = AdapterRows.of(plan.row_slots)
            shape = self._shape_of(plan, rows, adapters)
            if shape is not None and self._graphs is not None:
                return self._replayed(self._graphs, shape, plan, rows, cache, adapters)
            return self._launched(plan, rows, cache, adapters)

    def _launched(
        self, plan: StepPlan, rows: AdapterRows, cache: CudaKVCache, adapters: CudaAdapterSlots
    ) -> CudaLogits:
        batch = self._plans.send(plan, rows, adapters, self._uploads).batch()
        self._copy_blocks(plan, batch, cache)
        stream = self._stream(batch, cache)
        hidden = self._ends.hidden(batch, stream)
        if self.architecture.head is None:
            return self._logits(self._buffers.logits[:0], hidden, [])
        found, own = self._ends.logits(batch, stream, self.architecture.head)
        return self._logits(found, hidden, own)

    def _shape_of(self, plan: StepPlan, rows: AdapterRows, adapters: CudaAdapterSlots) -> Shape | None:
        """Of the graph that a step may use."""
        if self._graphs is None or self.architecture.head is None:
            return None
        shape = Shape.of(plan, adapters.acting(rows))
        if shape is None or shape.rows > self._limits.max_rows:
            return None
        return shape

    def _replayed(
        self,
        graphs: Graphs,
        shape: Shape,
        plan: StepPlan,
        rows: AdapterRows,
        cache: CudaKVCache,
        adapters: CudaAdapterSlots,
    ) -> CudaLogits:
        graphs.use(cache, adapters)
        spare_cell = cache.spare_block * cache.block_size
        sent = self._plans.send_padded(plan, rows, adapters, graphs.uploads(shape), shape, spare_cell)
        if plan.block_copies:
            self._copy_blocks(plan, sent.batch(), cache)

        def launch() -> None:
            batch = sent.batch()
            assert self.architecture.head is not None
            self._ends.logits(batch, self._stream(batch, cache), self.architecture.head)

        graphs.run(shape, launch)
        found = self._buffers.logits[: plan.logit_rows.size]
        return self._logits(found, self._buffers.left[:0], [])

    def _stream(self, batch: Batch, cache: CudaKVCache) -> Tensor:
        """Of all rows, behind the last layer."""
        self._ends.enter(batch)
        return Layers(
            self.architecture, self.weights, batch, self._lanes, cache, self._layout, self._buffers
        ).run()

    def _copy_blocks(self, plan: StepPlan, batch: Batch, cache: CudaKVCache) -> None:
        if plan.block_copies:
            cache.copy_blocks(batch.copies, batch.num_copies, min(_COPYING, len(plan.block_copies)))

    def _logits(self, found: Tensor, hidden: Tensor, own: list[OwnRows]) -> CudaLogits:
        return CudaLogits(found, hidden, own, self._finishers, self._buffers.chosen)


class _Finishers:
    """What chooses from logits; its scratch memory grows with the largest vocabulary of a task.

    Args:
        runtime: of the device.
        limits: of steps.
        vocab_size: of the base; 0 for an encoder.
    """

    def __init__(self, runtime: Runtime, limits: Limits, vocab_size: int) -> None:
        self.runtime = runtime
        self._limits = limits
        self._capacity = max(1, vocab_size)
        self._finisher = self._new()
        self.uploads = Uploads(runtime)

    def of(self, vocab_size: int) -> Finisher:
        """For logits of so many columns."""
        if vocab_size > self._capacity:
            self._capacity = -(-vocab_size // _TOKENS) * _TOKENS
            self._finisher = self._new()  # steps in flight have the one before
        return self._finisher

    def _new(self) -> Finisher:
        limits = self._limits
        choosing = Choosing(self.runtime.device, limits.max_rows, limits.max_choices, self._capacity)
        return Finisher(choosing, self.runtime)

    @property
    def num_bytes(self) -> int:
        """Of the scratch memory."""
        return self._finisher.choosing.num_bytes


class CudaLogits:
    """``Logits`` of a step: those of the base's vocabulary, and of tasks with another.

    Args:
        values: [M, V] float32.
        hidden: hidden values to return, [H, E] float32.
        own: rows of tasks with a vocabulary of their own.
        finishers: of the model.
        chosen: where the tokens of choices are left for the next step, [≥ S] int32.
    """

    def __init__(
        self,
        values: Tensor,
        hidden: Tensor,
        own: list[OwnRows],
        finishers: _Finishers,
        chosen: Tensor,
    ) -> None:
        self.values = values
        self._hidden = hidden
        self._own = own
        self._finishers = finishers
        self._chosen = chosen

    @torch.inference_mode()
    def finish(self, wants: Wants) -> DevicePending | PendingParts:
        """Launch what is wanted."""
        with launching(self._finishers.runtime):
            return self._finish(wants)

    def _finish(self, wants: Wants) -> DevicePending | PendingParts:
        if not self._own:
            pending, tokens = self._launched(self.values, wants)
            self._chosen[: tokens.numel()].copy_(tokens)
            return pending
        vocabularies = Vocabularies.of(self._own, self.values.shape[1], wants)
        places = self._finishers.uploads.send(
            {str(index): each.astype(np.int64) for index, each in enumerate(vocabularies.places)}
        )
        parts = []
        for index, (group, part) in enumerate(vocabularies.wants):
            pending, tokens = self._launched(self.values if group is None else group.values, part)
            self._chosen.index_copy_(0, places[str(index)], tokens)
            parts.append(pending)
        return PendingParts(vocabularies, parts)

    def _launched(self, values: Tensor, wants: Wants) -> tuple[DevicePending, Tensor]:
        """What is pending, and the tokens of the choices, on the device."""
        finisher = self._finishers.of(values.shape[1])
        pending = DeviceLogits(values, finisher, self._hidden).finish(wants)
        return pending, on_device(pending.found.tokens, finisher.found, torch.int32)
