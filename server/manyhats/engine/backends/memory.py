"""How a GPU's memory is divided: what is left for keys and values, and what the largest step takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from manyhats.engine.backends.backend import AdapterSlots, Backend, Model
from manyhats.engine.backends.dtypes import block_bytes
from manyhats.engine.backends.limits import Limits
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.wants import Choices, Outcome, Targets, Wants
from manyhats.engine.backends.warmup import every_filter
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """The memory of one GPU, in bytes.

    Attributes:
        total: of the card.
        used: by whatever, the weights among it.
        step: what the largest step takes besides: ``peak − current`` of running it once.
        adapters: what loaded adapters may take.
        fraction: of ``total`` that may be taken.
    """

    total: int
    used: int
    step: int
    adapters: int
    fraction: float

    @property
    def left(self) -> int:
        """For keys and values: ``total · fraction − used − step − adapters``, or 0."""
        return max(0, int(self.total * self.fraction) - self.used - self.step - self.adapters)

    def cache_bytes(
        self, architecture: Architecture, block_bytes: int, block_size: int, limits: Limits
    ) -> int:
        """What is left, in blocks, but no more than all sequences can fill.

        Raises:
            ModelError: it is less than a block.
        """
        of_sequence = -(-architecture.max_context_length // block_size)
        num_blocks = min(self.left // block_bytes, limits.max_sequences * of_sequence)
        if num_blocks < 1:
            raise ModelError(
                f"the GPU's memory leaves no room for the KV cache: of {_gib(self.total)}, {self.fraction:g} may be "
                f"taken; {_gib(self.used)} are in use, a step takes {_gib(self.step)}, adapters may take "
                f"{_gib(self.adapters)}. A larger --gpu-memory-fraction, a smaller --adapter-memory-bytes or "
                "--max-batched-tokens, or a smaller model leaves more"
            )
        return num_blocks * block_bytes


def cache_bytes_left(
    backend: Backend,
    model: Model[Any, Any],
    slots: AdapterSlots[Any],
    block_size: int,
    dtype: str,
    limits: Limits,
    device: torch.device,
) -> int:
    """What is left of a GPU's memory for keys and values beside the model, its largest step, and adapters.

    Args:
        backend: the model's.
        model: prepared.
        slots: empty.
        block_size: cells per block.
        dtype: of the cache.
        limits: of the engine.
        device: the GPU.

    Raises:
        ModelError: less than a block.
    """
    architecture = model.architecture
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_largest(backend, model, slots, block_size, dtype, limits)
    step = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    memory = DeviceMemory(
        total=total,
        used=total - free,
        step=step,
        adapters=limits.adapter_bytes,
        fraction=limits.memory_fraction,
    )
    size = block_bytes(architecture, block_size, dtype)
    return memory.cache_bytes(architecture, size, block_size, limits)


def run_largest(
    backend: Backend,
    model: Model[Any, Any],
    slots: AdapterSlots[Any],
    block_size: int,
    dtype: str,
    limits: Limits,
) -> Outcome:
    """Run the largest step once, on a cache that is just large enough, which is given back."""
    architecture = model.architecture
    plan = largest_plan(limits, block_size, architecture)
    num_bytes = plan.block_tables.size * block_bytes(architecture, block_size, dtype)
    cache = backend.new_cache(architecture, block_size, dtype, num_bytes)
    return model.forward(plan, cache, slots).finish(largest_wants(limits, plan)).result()


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def largest_plan(limits: Limits, block_size: int, architecture: Architecture) -> StepPlan:
    """A step of as many rows as there may be, all in one sequence, on the base model, whose results are all wanted."""
    num_rows = min(limits.max_rows, architecture.max_context_length)
    rows = np.arange(num_rows, dtype=np.int32)
    is_encoder = architecture.head is None
    return StepPlan(
        token_ids=np.zeros(num_rows, np.int32),
        positions=rows,
        cells=rows.astype(np.int64),
        query_start=int32([0, num_rows]),
        context_len=int32([num_rows]),
        block_tables=np.arange(-(-num_rows // block_size), dtype=np.int32)[None, :],
        row_slots=np.zeros(num_rows, np.int32),
        logit_rows=rows[:0] if is_encoder else rows,
        hidden_rows=rows if is_encoder else rows[:0],
    )


def largest_wants(limits: Limits, plan: StepPlan) -> Wants:
    """Every sequence samples with filters and log-probabilities, and every row has a target."""
    size, num_rows = min(limits.max_sequences, plan.logit_rows.size), plan.logit_rows.size
    one = every_filter()
    if not num_rows:
        return replace(one, choices=_repeated(one.choices, 0))
    rows = np.arange(num_rows)
    targets = Targets(rows=rows, ids=np.zeros(num_rows, np.int64), num_top=np.ones(num_rows, np.int64))
    return replace(one, choices=_repeated(one.choices, size), targets=targets)


def _repeated(choices: Choices, size: int) -> Choices:
    """Rows 0 … size − 1, each as the one that is given."""
    others: dict[str, Any] = {
        "rows": np.arange(size, dtype=np.int32),
        "edit_start": np.zeros(size + 1, np.int64),
    }
    of_edits = {"edit_ids", "edit_bias", "edit_seen", "edit_counts", "masks"}
    of_rows = {field.name for field in fields(choices)} - others.keys() - of_edits
    repeated: dict[str, Any] = {name: np.repeat(getattr(choices, name), size) for name in of_rows}
    return replace(choices, **repeated, **others)
