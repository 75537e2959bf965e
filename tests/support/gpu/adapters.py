"""Adapters in slots on the kernels' device, a step's rows of them, and what the torch backend holds of the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhats.adapters import equations
from manyhats.adapters.primitives import Affine, Bottleneck, Delta, Gate, LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters.layout import LargestSizes
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace
from manyhats.engine.backends.cuda.runtime import runtime_on
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.backends.torch.adapters import TorchAdapter, TorchAdapterSlots
from manyhats.engine.backends.torch.texts import Texts
from manyhats.engine.model.architecture import Architecture
from support.factories.architectures import make_architecture, make_attention
from support.gpu.interpreter import DEVICE

NAN = float("nan")
LARGEST = LargestSizes(rank=48, bottleneck=48)
ARENA_BYTES = 1 << 21
NOTHING = TorchAdapter({}, 0)


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
        self.slots = CudaAdapterSlots(
            self.architecture, len(adapters) + 1, ARENA_BYTES, LARGEST, runtime_on(device)
        )
        self.slots.memory.buffer.fill_(0xFF)  # NaN, whatever it is taken for
        self.layout = self.slots.layout
        self.torch: dict[int, TorchAdapter] = {}
        oracle = TorchAdapterSlots(torch.bfloat16)
        for slot, deltas in enumerate(adapters, start=1):
            lowered = LoweredAdapter(str(slot), tuple(deltas), vocab_size=(vocab_sizes or {}).get(slot))
            self.slots.place(slot, self.slots.pack(lowered))
            self.torch[slot] = oracle.pack(placed(lowered))

    def rows(self, row_slots: Sequence[int]) -> AdapterRows:
        return AdapterRows.of(np.array(row_slots, np.int32))

    def step(
        self, row_slots: Sequence[int], *, slack: int = 0, starts: Sequence[int] | None = None
    ) -> StepAdapters:
        """A step whose rows have these slots; with slack, its grids and tensors reach beyond what it has."""
        rows, first = self.rows(row_slots), None if starts is None else np.array(starts, np.int32)
        step = StepAdapters.of(rows, self.slots.records, self.slots.acting(rows), first)
        return widened(step, slack) if slack else step

    def workspace(self, num_rows: int) -> Workspace:
        """Poisoned."""
        work = Workspace.of(num_rows, self.layout, LARGEST, torch.device(DEVICE))
        for field in fields(work):
            getattr(work, field.name).fill_(NAN)
        return work


def placed(value: Any) -> Any:
    """The same with every tensor on the kernels' device, where oracles meet what kernels gave."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple):
        return tuple(placed(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: placed(getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **changed)
    return value


def texts_of(starts: Sequence[int] | None) -> Texts:
    """What rows of texts share, or are, in the torch backend; without starts no gate is asked for."""

    def product(x: Tensor, gate: Gate) -> Tensor:
        return x.double() @ gate.weight.double().T + gate.bias.double()

    return Texts(np.array([0] if starts is None else starts, np.int32), product)


def outputs_of(
    served: Served,
    layer: int,
    group: str,
    row_slots: Sequence[int],
    x: Tensor,
    y: Tensor,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """A group's outputs y as each row's adapter changes them, one row and one linear at a time, in float64."""
    found, start, texts = y.double().clone(), 0, texts_of(starts)
    for member in served.layout.groups[group].members:
        site, columns = Site(layer, member.name), slice(start, start + member.d_out)
        start = columns.stop
        for row, slot in enumerate(row_slots):
            held, rows = served.torch.get(slot, NOTHING), torch.tensor([row])
            for delta in held.at(site, Affine):
                gate = texts.gate(delta.gate, rows, lambda: x)
                found[row, columns] = equations.affine(found[row, columns], delta, gate)
            for low_rank in held.at(site, LowRank):
                a, b = low_rank.a.double(), low_rank.b.double()
                scale = low_rank.scale * texts.gate(low_rank.gate, rows, lambda: x)
                found[row, columns] += equations.low_rank(x[row].double(), a, b, scale).flatten()
    return found


def sublayer_of(
    served: Served,
    site: Site,
    row_slots: Sequence[int],
    r: Tensor,
    m: Tensor,
    norm: Callable[[Tensor], Tensor] | None = None,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """A sub-layer's output m as each row's adapter changes it, one row at a time."""
    found, texts = m.clone(), texts_of(starts)
    for row, slot in enumerate(row_slots):
        for delta in served.torch.get(slot, NOTHING).at(site, Bottleneck):
            rows, mask = torch.tensor([row]), torch.ones(1, delta.down.shape[0], device=r.device)
            gate = texts.gate(delta.gate, rows, partial(equations.bottleneck_input, delta, r, m, norm))
            if delta.ends is not None:
                mask = texts.ends(delta.ends, rows, delta.down.shape[0])
            if mask.any():
                found[row] = equations.bottleneck(delta, r[rows], m[rows], norm, gate, mask)[0]
    return found


def widened(step: StepAdapters, slack: int) -> StepAdapters:
    """The same with more rows, segments and texts in its tensors and grids, which name what is not there."""

    def longer(values: Tensor) -> Tensor:
        return torch.cat((values, values.new_full((slack, *values.shape[1:]), 1 << 20)))

    texts = step.texts
    if texts is not None:
        texts = replace(
            texts,
            starts=longer(texts.starts),
            items=longer(texts.items),
            within=longer(texts.within),
            max_texts=texts.max_texts + slack,
        )
    return replace(
        step,
        texts=texts,
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
