"""A model on CUDA: its weights, the memory that its steps work in, and its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.adapters.layout import LargestSizes, RecordLayout
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.attention_work import Tiling
from manyhats.engine.backends.cuda.batch import Lanes, batch_of
from manyhats.engine.backends.cuda.buffers import Buffers
from manyhats.engine.backends.cuda.cache import CudaKVCache
from manyhats.engine.backends.cuda.choosing import Choosing
from manyhats.engine.backends.cuda.ends import Ends
from manyhats.engine.backends.cuda.layers import Layers
from manyhats.engine.backends.cuda.logits import DeviceLogits, DevicePending, Finisher
from manyhats.engine.backends.cuda.self_test import check_linears
from manyhats.engine.backends.cuda.upload import Uploads
from manyhats.engine.backends.cuda.weights import CudaWeights
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.own_logits import OwnRows, PendingParts, Vocabularies
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.wants import Wants
from manyhats.engine.backends.warmup import run_one
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress

_MAX_SLOTS = 2048
"""Parts of the attention that there is room for: longer contexts of more rows are not split."""
_COPYING = 64
"""Programs that copy blocks, for each layer."""


@dataclass(frozen=True, slots=True)
class Device:
    """What is run on.

    Attributes:
        torch: its name.
        sm: compute capability, such as 90.
        num_processors: that run programs side by side.
    """

    torch: torch.device
    sm: int
    num_processors: int


class CudaModel:
    """``Model`` by the kernels of ``triton``.

    Args:
        architecture: what is computed.
        weights: in host memory.
        device: where.
        limits: of steps.
        largest: of adapters.

    Raises:
        ModelError: there are no kernels for a block.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        device: Device,
        limits: Limits,
        largest: LargestSizes,
    ) -> None:
        self.architecture = architecture
        self._limits = limits
        self.weights = CudaWeights(architecture, weights, device.sm, device.torch)
        tiling = Tiling.of(architecture.attention)
        self._lanes = Lanes(tiling, max(1, 2 * device.num_processors // tiling.head_tiles), _MAX_SLOTS)
        self._layout = RecordLayout(architecture)
        self._buffers = Buffers.of(
            architecture, self.weights.linears(), limits.max_rows, _MAX_SLOTS, largest, device.torch
        )
        self._ends = Ends(architecture, self.weights, self._layout, self._buffers)
        self._uploads = Uploads(device.torch)
        self._finishers = _Finishers(device.torch, limits)

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """Resident bytes: the layers' linears; embedding, head and norms; what steps work in."""
        return {**self.weights.num_bytes, "workspace": self._buffers.num_bytes + self._finishers.num_bytes}

    def warm_up(self, cache: CudaKVCache, adapters: CudaAdapterSlots, slot: int, progress: Progress) -> None:
        """Compiles kernels, and proves that linears are right and the model runs."""
        check_linears(self.weights.linears(), self._buffers.linear, self._limits.max_rows)
        run_one(self, cache, adapters, slot)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, cache: CudaKVCache, adapters: CudaAdapterSlots) -> CudaLogits:
        """Launches a step, which writes its keys and values."""
        batch = batch_of(plan, self.architecture, self._lanes, adapters, self._uploads)
        if plan.block_copies:
            cache.copy_blocks(batch.copies, batch.num_copies, min(_COPYING, len(plan.block_copies)))
        self._ends.enter(batch)
        stream = Layers(
            self.architecture, self.weights, batch, self._lanes, cache, self._layout, self._buffers
        ).run()
        hidden = self._ends.hidden(batch, stream)
        if self.architecture.head is None:
            return CudaLogits(self._buffers.logits[:0], hidden, [], self._finishers)
        found, own = self._ends.logits(batch, stream, self.architecture.head)
        return CudaLogits(found, hidden, own, self._finishers)


class _Finishers:
    """One for each size of vocabulary, since its scratch memory is made for that."""

    def __init__(self, device: torch.device, limits: Limits) -> None:
        self._device = device
        self._limits = limits
        self._by_size: dict[int, Finisher] = {}

    def of(self, vocab_size: int) -> Finisher:
        """Made when it is first asked for."""
        if vocab_size not in self._by_size:
            limits = self._limits
            choosing = Choosing(self._device, limits.max_rows, limits.max_sequences, max(1, vocab_size))
            self._by_size[vocab_size] = Finisher(choosing, self._device)
        return self._by_size[vocab_size]

    @property
    def num_bytes(self) -> int:
        """Of their scratch memory."""
        return sum(each.choosing.num_bytes for each in self._by_size.values())


class CudaLogits:
    """``Logits`` of a step: those of the base's vocabulary, and of tasks with another.

    Args:
        values: [M, V] float32.
        hidden: hidden values to return, [H, E] float32.
        own: rows of tasks with a vocabulary of their own.
        finishers: of the model.
    """

    def __init__(self, values: Tensor, hidden: Tensor, own: list[OwnRows], finishers: _Finishers) -> None:
        self.values = values
        self._hidden = hidden
        self._own = own
        self._finishers = finishers

    def finish(self, wants: Wants) -> DevicePending | PendingParts:
        """Launch what is wanted."""
        if not self._own:
            return self._launched(self.values, wants)
        vocabularies = Vocabularies.of(self._own, self.values.shape[1], wants)
        return PendingParts(
            vocabularies,
            [
                self._launched(self.values if group is None else group.values, part)
                for group, part in vocabularies.wants
            ],
        )

    def _launched(self, values: Tensor, wants: Wants) -> DevicePending:
        return DeviceLogits(values, self._finishers.of(values.shape[1]), self._hidden).finish(wants)
