"""Steps of the engine through its seam to a backend: decodes, prompts, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import numpy as np
import torch

from benchmarks.gpu.model import RandomModel, adapter_bytes, random_lora
from benchmarks.gpu.plans import BLOCK, Part, greedy, plan_of
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import event
from manyhats.engine.backends.backend import Backend, Pending
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.wants import Wants

_HIDDEN_STEPS = 3
_SLEEP_CYCLES = 100_000_000
"""Some 50 ms, in which the host launches a step."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of steps one after another.

    Attributes:
        step_s: from the end of one step to the end of the next, by the host's clock, in their order.
        device_s: what the device alone takes for such a step; empty where that was not measured.
    """

    step_s: list[float]
    device_s: list[float]

    @property
    def median_s(self) -> float:
        """Of the steps."""
        return median(self.step_s)

    @property
    def host_share(self) -> float | None:
        """Of a step, how much the device waits for the host; None where that was not measured."""
        return 1 - median(self.device_s) / self.median_s if self.device_s else None


class Engine:
    """A model on a backend, with a cache and slots.

    Args:
        backend: whichever.
        model: laid out on it.
        scale: how many sequences there may be, how long, and their adapters.
        num_slots: for adapters, besides the base.

    Attributes:
        num_ahead: steps that are launched before the one before them is collected: 1 if the backend runs ahead.
    """

    def __init__(self, backend: Backend, model: RandomModel, scale: Scale, num_slots: int) -> None:
        architecture = model.architecture
        self._vocab_size = architecture.vocab_size
        self._is_cuda = scale.is_gpu
        self._num_warm = scale.num_warm
        self.num_ahead = int(backend.runs_ahead)
        self._decode_blocks = -(-(scale.step_context + 4 * scale.num_steps + 8) // BLOCK)
        self.model = backend.prepare(architecture, model.weights)
        left = _left(scale, num_slots * adapter_bytes(architecture, scale.rank))
        self.adapters = backend.new_adapters(architecture, num_slots + 1, "bfloat16")
        num_blocks = max(
            (max(scale.decode_rows) + 1) * self._decode_blocks, -(-max(scale.step_prompts) // BLOCK)
        )
        wanted = num_blocks * BLOCK * architecture.kv_bytes_per_token("bfloat16")
        num_bytes = min(wanted, left)
        self.cache = backend.new_cache(architecture, BLOCK, "bfloat16", num_bytes)
        # One adapter in many slots: each has its own memory, and what is in it changes no time.
        self.packed = self.adapters.pack(random_lora(architecture, scale.rank, "random"))
        self.placed: set[int] = set()

    def place(self, count: int) -> None:
        """Have adapters in slots 1 … count, and in no other."""
        for slot in sorted(self.placed - set(range(1, count + 1))):
            self.adapters.clear(slot)
        for slot in sorted(set(range(1, count + 1)) - self.placed):
            self.adapters.place(slot, self.packed)
        self.placed = set(range(1, count + 1))

    @property
    def longest(self) -> int:
        """Tokens of a sequence of decodes."""
        return self._decode_blocks * BLOCK

    def can_hold(self, rows: int) -> bool:
        """Whether so many sequences fit into the cache."""
        return rows * self._decode_blocks <= self.cache.num_blocks

    def decode(
        self,
        rows: int,
        context: int,
        num_steps: int,
        num_adapters: int = 0,
        while_steps: Callable[[int], object] = lambda step: None,
    ) -> StepTimes:
        """Steps of one token of each sequence, their rows on adapters 1, 2, … in turn; the first ones warm up."""

        def slot(row: int) -> int:
            return 1 + row % num_adapters if num_adapters else 0

        plans = [
            plan_of(
                [Part(row, context + step, context + step + 1, slot(row)) for row in range(rows)],
                self._decode_blocks,
                self._vocab_size,
            )
            for step in range(self._num_warm + num_steps + _HIDDEN_STEPS)
        ]
        hidden = plans[-_HIDDEN_STEPS:] if self._is_cuda else []
        del plans[-_HIDDEN_STEPS:]
        if self.num_ahead:  # the token that the step before chooses
            chosen = int32(-1 - np.arange(rows))
            plans[1:] = [replace(plan, token_ids=chosen) for plan in plans[1:]]
        step_s = self.run(plans, self._num_warm, while_steps)
        return StepTimes(step_s, [self._device_s(plan) for plan in hidden])

    def prefill(self, length: int, max_rows: int) -> StepTimes:
        """One prompt, in steps of at most so many rows."""
        plans = [
            plan_of(
                [Part(0, start, min(length, start + max_rows))],
                -(-length // BLOCK),
                self._vocab_size,
            )
            for start in range(0, length, max_rows)
        ]
        return StepTimes(self.run(plans, 0), [])

    def mixed(self, rows: int, context: int, prompt: int, num_steps: int) -> StepTimes:
        """Decodes beside the beginning of a prompt."""
        plans = [
            plan_of(
                [
                    *(Part(row, context + step, context + step + 1) for row in range(rows)),
                    Part(rows, 0, prompt),
                ],
                self._decode_blocks,
                self._vocab_size,
            )
            for step in range(self._num_warm + num_steps)
        ]
        return StepTimes(self.run(plans, self._num_warm), [])

    def run(
        self,
        plans: Sequence[StepPlan],
        num_warm: int,
        while_steps: Callable[[int], object] = lambda step: None,
    ) -> list[float]:
        """Launch each when the one before it is collected, or launched if the backend runs ahead.

        Args:
            plans: one step after another.
            num_warm: of them that are not counted.
            while_steps: called before each launch, with the number of steps that were counted so far.

        Returns:
            Seconds of each step.

        Raises:
            RuntimeError: logits are not finite.
        """
        wants = [self._wants(plan) for plan in plans]
        waiting: list[Pending] = []
        ends_s = [time.perf_counter()]
        for index, (plan, wanted) in enumerate(zip(plans, wants, strict=True)):
            while_steps(index - num_warm)
            waiting.append(self.model.forward(plan, self.cache, self.adapters).finish(wanted))
            if len(waiting) > self.num_ahead:
                ends_s.append(_collected(waiting.pop(0)))
        ends_s += [_collected(pending) for pending in waiting]
        return [after - before for before, after in pairwise(ends_s[num_warm:])]

    def _device_s(self, plan: StepPlan) -> float:
        """Of a step that the host has launched before the device gets to it."""
        wanted, begin, end = self._wants(plan), event(), event()
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        pending = self.model.forward(plan, self.cache, self.adapters).finish(wanted)
        end.record()
        _collected(pending)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _wants(self, plan: StepPlan) -> Wants:
        return greedy(plan.logit_rows.size, self._vocab_size)


def _collected(pending: Pending) -> float:
    """When it is."""
    bad = pending.result().bad_rows
    if bad:
        raise RuntimeError(f"logits of rows {sorted(bad)} are not finite")
    return time.perf_counter()


def most_adapters(scale: Scale, model: RandomModel) -> int:
    """How many may be in memory: as many as steps have, in a quarter of the card."""
    most = max(*scale.step_adapters, scale.num_streams + 1)
    if not scale.is_gpu:
        return most
    _, total = torch.cuda.mem_get_info()
    return min(most, total // 4 // adapter_bytes(model.architecture, scale.rank))


def _left(scale: Scale, for_adapters: int) -> int:
    """Bytes for the cache; some are left to steps, and to adapters, which have none yet."""
    if not scale.is_gpu:
        return 1 << 30
    free, _ = torch.cuda.mem_get_info()
    return max(0, int(0.9 * free) - for_adapters - (2 << 30))


def limits_of(scale: Scale, model: RandomModel) -> Limits:
    """Room for the steps of the benchmark, and for their adapters."""
    most = most_adapters(scale, model) + 1
    size = adapter_bytes(model.architecture, scale.rank)
    return Limits(
        max_rows=max(scale.max_rows, *scale.decode_rows),
        max_sequences=max(*scale.decode_rows, scale.num_streams) + 1,
        adapter_bytes=int(most * (size * 1.05 + 65536)),
        memory_fraction=0.9,
    )


def open_strict(scale: Scale, model: RandomModel) -> Backend:
    """The engine's own kernels: a row's bits depend on that row alone. On a GPU steps are graphs."""
    from manyhats.engine.backends.cuda.backend import CudaBackend

    return CudaBackend(scale.device, limits_of(scale, model))


class _Launches:
    """In the place of a graph: launches again what would have been recorded."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def replay(self) -> None:
        """Launch it."""
        self._launch()


def open_launched(scale: Scale, model: RandomModel) -> Backend:
    """The same steps without graphs."""
    from manyhats.engine.backends.cuda.backend import CudaBackend

    return CudaBackend(scale.device, limits_of(scale, model), _Launches)


def open_fast(scale: Scale, model: RandomModel) -> Backend:
    """Plain torch with bitsandbytes' products."""
    from manyhats.engine.backends.torch.backend import TorchBackend

    return TorchBackend(scale.device, "bfloat16", by_row=False, limits=limits_of(scale, model))
