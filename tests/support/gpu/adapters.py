"""Adapters in slots on the kernels' device, a step's rows of them, and what the torch backend holds of the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters.primitives import Delta, LoweredAdapter
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.backends.torch.adapters import TorchAdapter, TorchAdapterSlots
from manyhats.engine.model.architecture import Architecture
from support.factories.architectures import make_architecture, make_attention
from support.gpu.interpreter import DEVICE

NAN = float("nan")
LARGEST = LargestSizes(rank=48, bottleneck=48)
ARENA_BYTES = 1 << 21


def odd_architecture(*, hidden_size: int = 40, width: int = 72) -> Architecture:
    """Two layers whose linears have no size in common with a tile."""
    attention = make_attention(4, 2, 12)
    return make_architecture(attention, num_layers=2, hidden_size=hidden_size, width=width, vocab_size=70)


class Served:
    """Slot 1, 2, … in both backends: on the kernels' device, and as the torch backend rounds them.

    Args:
        adapters: the deltas of each.
        architecture: of the base.
        vocab_sizes: of the tasks, by slot.
    """

    def __init__(
        self,
        adapters: Sequence[Sequence[Delta]],
        architecture: Architecture | None = None,
        vocab_sizes: dict[int, int] | None = None,
    ) -> None:
        self.architecture = architecture or odd_architecture()
        device = torch.device(DEVICE)
        self.slots = CudaAdapterSlots(self.architecture, len(adapters) + 1, ARENA_BYTES, LARGEST, device)
        self.slots._memory.fill_(0xFF)  # NaN, whatever it is taken for
        self.layout = self.slots.layout
        self.torch: dict[int, TorchAdapter] = {}
        oracle = TorchAdapterSlots(torch.bfloat16, device)
        for slot, deltas in enumerate(adapters, start=1):
            lowered = LoweredAdapter(str(slot), tuple(deltas), vocab_size=(vocab_sizes or {}).get(slot))
            self.slots.place(slot, self.slots.pack(lowered))
            self.torch[slot] = oracle.pack(lowered)

    def rows(self, row_slots: Sequence[int]) -> AdapterRows:
        return AdapterRows.of(np.array(row_slots, np.int32))

    def step(self, row_slots: Sequence[int], *, slack: int = 0) -> StepAdapters:
        """A step whose rows have these slots; with slack, its grids and tensors reach beyond what it has."""
        rows = self.rows(row_slots)
        step = StepAdapters.of(rows, self.slots.records, self.slots.acting(rows))
        return widened(step, slack) if slack else step

    def workspace(self, num_rows: int) -> Workspace:
        """Poisoned."""
        work = Workspace.of(num_rows, self.layout, LARGEST, torch.device(DEVICE))
        return Workspace(*(part.fill_(NAN) for part in (work.inside, work.read, work.found)))


def widened(step: StepAdapters, slack: int) -> StepAdapters:
    """The same with more rows and segments in its tensors and grids, which name what is not there."""

    def longer(values: Tensor) -> Tensor:
        return torch.cat((values, values.new_full((slack, *values.shape[1:]), 1 << 20)))

    return replace(
        step,
        rows=longer(step.rows),
        slots=longer(step.slots),
        segments=longer(step.segments),
        max_rows=step.max_rows + slack,
        max_segments=step.max_segments + slack,
    )


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Random values on the kernels' device."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def off(found: Tensor, expected: Tensor) -> float:
    """``‖Δ‖ / ‖expected‖``."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
