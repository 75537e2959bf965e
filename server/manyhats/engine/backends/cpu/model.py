"""A model on the CPU, which runs its forward's program."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.choosing.ahead import choosing_compiled_ahead
from manyhats.engine.backends.cpu.compile import counted_compilation
from manyhats.engine.backends.cpu.forward import LAST, LOGITS, Forward
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.logits import CpuLogits
from manyhats.engine.backends.cpu.units import Units
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

    Raises:
        ModelError: the kernel does not know what a block computes.
    """

    def __init__(self, architecture: Architecture, weights: Weights, kernels: CpuKernels) -> None:
        self.architecture = architecture
        self._kernels = kernels
        self._embed = weights.embedding
        self._num_norm_values = sum(norm.weight.numel() for norm in weights.norms())
        self._forward = Forward(architecture, weights, kernels)
        self._memory = {buffer: torch.empty(0) for buffer in self._forward.sizes}
        self.instructions = self._forward.program.arrays()

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears, and embedding, head and norms."""
        is_tied = self.architecture.head.is_tied
        embed = 0 if is_tied else self._embed.numel() * self._embed.element_size()
        return {
            "base": self._forward.num_bytes,
            "embeddings": int(embed + self._forward.head.num_bytes + 4 * self._num_norm_values),
        }

    def warm_up(self, cache: CpuKVCache, adapters: CpuAdapterSlots, slot: int, progress: Progress) -> None:
        """Compiles or loads the kernels, the one that takes longest in a process of its own."""
        compiled = LatestProgress(progress)
        with counted_compilation(compiled), choosing_compiled_ahead(compiled.again) as wait:
            run_one(self, cache, adapters, slot, before_choosing=wait)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, cache: CpuKVCache, adapters: CpuAdapterSlots) -> CpuLogits:
        """Runs a step and writes its keys and values."""
        cache.copy_blocks(plan.block_copies)
        batch = Batch.of(plan)
        frame = np.zeros(col.FRAME_SIZE, dtype=np.int64)
        batch.describe(frame)
        cache.describe(frame)
        attention = self.architecture.attention
        heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
        units = Units.of(
            plan.query_start, plan.context_len, heads, cache.block_size, self._kernels.num_threads
        )
        units.describe(frame)
        described = adapters.describe(batch.adapter_rows, frame)
        num_scratch_values = max(
            self._forward.program.num_scratch_values,
            adapters.num_scratch_values,
            units.num_scratch_values,
        )
        buffers = self._buffers(batch, adapters)
        dtypes = cache.dtype, adapters.dtype
        self._kernels.run(self.instructions, frame, buffers, dtypes, num_scratch_values)
        del described  # the frame had its addresses
        logits = CpuLogits(self._forward.head, buffers[LAST], buffers[LOGITS], self._kernels)
        logits.change(adapters, batch.logit_adapter_rows)
        return logits

    def _buffers(self, batch: Batch, adapters: CpuAdapterSlots) -> list[Tensor]:
        """A step's buffers by number; those that no one sees afterwards stay for the next step."""
        num_rows, num_logit_rows = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        buffers = [self._embedded(batch, adapters)]
        for buffer, size in list(self._forward.sizes.items())[1:]:
            count = num_logit_rows if buffer == LAST else num_rows
            if self._memory[buffer].numel() < count * size:
                self._memory[buffer] = torch.empty(count * size)
            buffers.append(self._memory[buffer][: count * size].view(count, size))
        buffers.append(torch.empty((num_logit_rows, self._forward.head.own.out_features)))
        return buffers

    def _embedded(self, batch: Batch, adapters: CpuAdapterSlots) -> Tensor:
        """The residual stream as it begins, [N, D]."""
        x = self._embed.index_select(0, batch.token_ids).float()
        if batch.adapter_rows.num_adapters:
            adapters.change_embeddings(batch.token_ids, x, batch.adapter_rows)
        scale = self.architecture.embedding.scale
        if scale != 1.0:
            x.mul_(scale)
        if batch.embeddings is not None:
            rows, values = batch.embeddings
            x[rows] = values
        return x
