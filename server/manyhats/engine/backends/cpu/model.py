"""A model on the CPU, which runs its forward's program."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.attention.units import Units
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.cpu.building import (
    HIDDEN,
    LAST,
    LOGITS,
    NORMED_EMBEDDED,
    NUM_BUFFERS,
    OF_HIDDEN_ROWS,
    OF_LOGIT_ROWS,
)
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.choosing.ahead import choosing_compiled_ahead
from manyhats.engine.backends.cpu.compile import counted_compilation
from manyhats.engine.backends.cpu.forward import Forward
from manyhats.engine.backends.cpu.head.logits import CpuLogits
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import as_array
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.warmup import run_one
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import LatestProgress, Progress


class CpuModel:
    """``Model`` on the CPU.

    It holds weights, and the memory of one step; cache, adapters and plan are arguments.

    Attributes:
        instructions: of a forward.
        head: packed; None for an encoder.

    Raises:
        ModelError: the kernel does not know what a block computes.
    """

    def __init__(self, architecture: Architecture, weights: Weights, kernels: CpuKernels) -> None:
        self.architecture = architecture
        self._kernels = kernels
        self._embedding = as_array(weights.embedding)
        self._num_norm_values = sum(
            norm.weight.numel() * (1 if norm.bias is None else 2) for norm in weights.norms()
        )
        self._forward = Forward(architecture, weights, kernels)
        self.head = self._forward.head
        self._memory = {buffer: torch.empty(0) for buffer in self._forward.sizes}
        self._views = torch.empty((0, 0)), torch.empty((0, 0))
        self.instructions = self._forward.program.arrays()

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head and norms."""
        is_tied = self.architecture.head is not None and self.architecture.head.is_tied
        embed = 0 if is_tied else self._embedding.nbytes
        head = 0 if self.head is None else self.head.num_bytes
        outer = embed + head + self._forward.num_outer_bytes
        return {
            "base": self._forward.num_bytes,
            "embeddings": int(outer + 4 * self._num_norm_values),
        }

    def warm_up(self, cache: CpuKVCache, adapters: CpuAdapterSlots, slot: int, progress: Progress) -> None:
        """Compiles or loads the kernels, the one that takes longest in a process of its own."""
        compiled = LatestProgress(progress)
        with counted_compilation(compiled):
            if self.head is None:
                run_one(self, cache, adapters, slot)
                return
            with choosing_compiled_ahead(compiled.again) as wait:
                run_one(self, cache, adapters, slot, before_choosing=wait)

    def forward(self, plan: StepPlan, cache: CpuKVCache, adapters: CpuAdapterSlots) -> HostLogits:
        """Runs a step and writes its keys and values."""
        cache.copy_blocks(plan.block_copies)
        batch = Batch.of(plan)
        frame = np.zeros(col.FRAME_SIZE, dtype=np.int64)
        batch.describe(frame)
        frame[col.NUM_PAIRS] = frame[col.NUM_ROWS] * self._forward.num_per_row
        cache.describe(frame)
        attention = self.architecture.attention
        heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
        units = Units.of(
            plan.query_start,
            plan.context_len,
            heads,
            cache.block_size,
            self._kernels.num_threads,
            sees_all=attention.sees_all,
        )
        units.describe(frame)
        described = adapters.describe(batch.adapter_rows, frame)
        num_scratch_values = max(
            self._forward.program.num_scratch_values,
            adapters.num_scratch_values,
            units.num_scratch_values,
            cache.block_size,
        )
        buffers = self._buffers(batch, adapters)
        dtypes = cache.dtype, adapters.dtype
        self._kernels.run(self.instructions, frame, buffers, dtypes, num_scratch_values)
        del described  # the frame had its addresses
        if self.head is None:
            return HostLogits(torch.empty(0, 0), self._kernels, self._wanted(plan.hidden_rows.size))
        logits = CpuLogits(
            self.head, *self._last(plan.logit_rows.size), self._kernels, self._wanted(plan.hidden_rows.size)
        )
        if batch.logit_adapter_rows.num_adapters:
            logits.change(adapters, batch.logit_adapter_rows)
        return logits

    def _buffers(self, batch: Batch, adapters: CpuAdapterSlots) -> list[Tensor]:
        """A step's buffers by number, of at least the size that it needs; all but what is the step's own stay."""
        counts = dict.fromkeys(range(NUM_BUFFERS), batch.token_ids.shape[0])
        counts |= dict.fromkeys(OF_LOGIT_ROWS, batch.logit_rows.shape[0])
        counts |= dict.fromkeys(OF_HIDDEN_ROWS, batch.hidden_rows.shape[0])
        buffers = []
        for buffer, count in counts.items():
            if buffer == self._forward.first:
                buffers.append(self._embedded(batch, adapters))
                continue
            if buffer == NORMED_EMBEDDED:
                buffers.append(batch.normed)
                continue
            num_values = count * self._forward.sizes[buffer]
            if self._memory[buffer].numel() < num_values:
                self._memory[buffer] = torch.empty(num_values)
            buffers.append(self._memory[buffer])
        return buffers

    def _last(self, count: int) -> tuple[Tensor, Tensor]:
        """The head's inputs and the logits, [M, D] and [M, V]."""
        if self._views[0].shape[0] != count or self._views[1].data_ptr() != self._memory[LOGITS].data_ptr():
            inputs, outputs = (
                self._memory[buffer][: count * self._forward.sizes[buffer]].view(
                    count, self._forward.sizes[buffer]
                )
                for buffer in (LAST, LOGITS)
            )
            self._views = inputs, outputs
        return self._views

    def _wanted(self, count: int) -> Tensor | None:
        """The hidden values that are wanted, [H, E]."""
        size = self._forward.sizes[HIDDEN]
        return self._memory[HIDDEN][: count * size].view(count, size) if count else None

    def _embedded(self, batch: Batch, adapters: CpuAdapterSlots) -> Tensor:
        """The tokens' vectors, [N, E]."""
        # By NumPy, since a step of few rows comes with cold caches to this, and torch's way is longer.
        # Tokens beyond the table are their adapter's, which replaces what is taken for them.
        rows = np.take(self._embedding, batch.token_ids.numpy(), axis=0, mode="clip")
        if rows.dtype == np.uint16:
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        x = torch.from_numpy(rows)
        if batch.adapter_rows.num_adapters:
            adapters.change_embeddings(batch.token_ids, x, batch.adapter_rows)
        scale = self.architecture.embedding.scale
        if scale != 1.0:
            x.mul_(scale)
        if batch.embeddings is not None:
            own_rows, values = batch.embeddings
            x[own_rows] = values
        return x
