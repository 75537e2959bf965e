"""The CPU's backend with clocks: what the kernels, and what surrounds them, took in each step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.profile.costs import KERNELS, LINEARS
from manyhats.engine.backends.backend import Pending
from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.slots import CpuAdapterSlots
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.cache import CpuKVCache
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.model import CpuModel
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.wants import Wants
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.weights import Weights
from manyhats.engine.progress import Progress, no_progress

PART_OF = {
    col.NORM: "norms",
    col.ADD: "norms",
    col.ADD_NORM: "norms",
    col.LOCATE: "norms",
    col.SCALE: "norms",
    col.NORM_HEADS: "norms",
    col.GATHER: "norms",
    col.SCATTER: "norms",
    col.SILU: "gate",
    col.GELU_TANH: "gate",
    col.GELU: "gate",
    col.RELU: "gate",
    col.ROUTE: "gate",
    col.PAIR: "gate",
    col.SPREAD: "gate",
    col.COMBINE: "gate",
    col.SOFTCAP: "head",
    col.REFINE: "head",
    col.ROTATE: "rotation",
    col.ATTENTION: "attention",
    col.RESCALED: "deltas",
    col.DELTAS: "deltas",
    col.EXPERT_DELTAS: "deltas",
    col.EXPERT_DELTAS: "deltas",
    col.BOTTLENECK: "deltas",
    col.UNNORMED: "deltas",
    col.GATE_LINEARS: "deltas",
    col.GATE_SUBLAYER: "deltas",
    col.GATE_PREFIX: "deltas",
}
"""Kind of instruction → the part of a step that it belongs to; a linear's is that of its group."""
_NUM_OF_ATTENTION = 2
_ACTIVATIONS = (col.SILU, col.GELU_TANH, col.GELU, col.RELU)
_PRODUCTS = (col.LINEAR, col.QUANTIZE, col.NARROW, col.EXPERT_LINEAR)
_FILLED_BLOCKS = 64
_NOISE = 0.1

Ints = npt.NDArray[Any]


@dataclass(slots=True)
class TimedStep:
    """One forward, and the choice of tokens after it; seconds.

    Attributes:
        plan: of the step.
        labels: the part of each of the program's instructions.
        runs: what the kernel noted: instructions, and nanoseconds at the start and after each.
        forward_s: of the whole forward, with what surrounds its kernels.
        choosing_s: until the tokens are there.
        num_left: processors that were left to other work.
    """

    plan: StepPlan
    labels: Sequence[str]
    runs: Sequence[tuple[Ints, Ints]]
    forward_s: float
    num_left: int
    choosing_s: float = 0.0

    def parts(self) -> Mapping[str, float]:
        """Part → the time of its instructions; the head has what runs beside the program, such as a cap on logits."""
        sums = dict.fromkeys(KERNELS, 0.0)
        for rows, times in self.runs:
            labels = self.labels if len(rows) == len(self.labels) else ["head"] * len(rows)
            for part, taken_ns in zip(labels, np.diff(times).tolist(), strict=True):
                sums[part] += taken_ns / 1e9
        return sums


class TimedBackend(CpuBackend):
    """``CpuBackend`` that notes its steps.

    Prompts are not computed: their steps give zeros for logits, and their cells hold noise from the start. What a step
    of decodes takes depends on how many cells it reads, not on what they hold.

    Attributes:
        steps: of decodes alone, in order.
        head_bytes: of a weight of the head that steps read.
    """

    def __init__(self, num_threads: int, *, is_exact: bool = False) -> None:
        super().__init__(num_threads, is_exact=is_exact)
        self.steps: list[TimedStep] = []
        self.num_left = 0
        self.head_bytes = 0.0

    def prepare(  # type: ignore[override]  # the engine asks no more of a model than ``Model`` says
        self, architecture: Architecture, weights: Weights, progress: Progress = no_progress
    ) -> TimedModel:
        """Packs the weights."""
        model = super().prepare(architecture, weights, progress)
        assert model.head is not None  # of a decoder
        head = model.head.fast or model.head.own
        self.head_bytes = head.num_bytes / (head.in_features * head.out_features)
        return TimedModel(model, self._kernels, self)

    def new_cache(
        self, architecture: Architecture, block_size: int, dtype: str, num_bytes: int | None
    ) -> CpuKVCache:
        """A cache whose every cell is written, since untouched memory is read from one page of zeros."""
        cache = super().new_cache(architecture, block_size, dtype, num_bytes)
        attention = architecture.attention
        shape = (
            architecture.num_layers,
            _FILLED_BLOCKS * block_size,
            attention.num_kv_heads,
            attention.head_dim,
        )
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * _NOISE
        for first in range(0, cache.num_blocks, _FILLED_BLOCKS):
            blocks = range(first, min(first + _FILLED_BLOCKS, cache.num_blocks))
            cache.write(blocks, noise, noise)
        return cache

    def leave_processors(self, count: int) -> None:
        """Notes the number, too."""
        self.num_left = count
        super().leave_processors(count)


class TimedModel:
    """``Model`` on the CPU with clocks."""

    def __init__(self, model: CpuModel, kernels: CpuKernels, backend: TimedBackend) -> None:
        self.architecture = model.architecture
        self.num_bytes = model.num_bytes
        self._model = model
        self._kernels = kernels
        self._backend = backend
        self._labels = parts_of(model.instructions[0])

    def warm_up(self, cache: CpuKVCache, adapters: CpuAdapterSlots, slot: int, progress: Progress) -> None:
        """The model's own."""
        self._model.warm_up(cache, adapters, slot, progress)

    def forward(self, plan: StepPlan, cache: CpuKVCache, adapters: CpuAdapterSlots) -> TimedLogits:
        """Runs and times a step of decodes; skips any other."""
        if plan.num_rows > len(plan.context_len):
            zeros = torch.zeros(len(plan.logit_rows), self.architecture.vocab_size)
            return TimedLogits(HostLogits(zeros, self._kernels), None)
        timed: list[tuple[Ints, Ints]] = []
        self._kernels.timed = timed
        began_s = time.perf_counter()
        logits = self._model.forward(plan, cache, adapters)
        forward_s = time.perf_counter() - began_s
        self._kernels.timed = None
        step = TimedStep(plan, self._labels, timed, forward_s, self._backend.num_left)
        self._backend.steps.append(step)
        return TimedLogits(logits, step)


class TimedLogits:
    """``Logits`` that note how long it takes to choose tokens from them."""

    def __init__(self, logits: HostLogits, step: TimedStep | None) -> None:
        self._logits = logits
        self._step = step

    def finish(self, wants: Wants) -> Pending:
        """Compute everything at once."""
        began_s = time.perf_counter()
        pending = self._logits.finish(wants)
        if self._step is not None:
            self._step.choosing_s = time.perf_counter() - began_s
        return pending


def parts_of(rows: Ints) -> list[str]:
    """The part of a step that each instruction of a program belongs to.

    A linear does not say which group it is. The deltas that follow it do for the attention's, which come first; the
    head has none. A feed-forward's activation lies between its first linears, the router among them, and the last. What
    only prepares a linear's input is part of it.
    """
    parts: list[str] = []
    group, is_before = "head", False
    for row in rows[::-1]:
        kind = int(row[col.INSTRUCTION])
        if kind == col.DELTAS and row[col.GROUP] < _NUM_OF_ATTENTION:
            group, is_before = LINEARS[row[col.GROUP]], False
        elif kind in (col.DELTAS, col.COMBINE):
            group = "gate_up" if is_before else "down"
        elif kind in _ACTIVATIONS:
            group, is_before = "gate_up", True
        parts.append(group if kind in _PRODUCTS else PART_OF[kind])
    return parts[::-1]
