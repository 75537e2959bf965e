"""What each part of a step must move and compute, counted from the architecture, the plan and the adapters.

Bytes are what lies in memory between two steps, once each: weights, cells, adapters, logits. Activations pass from one
instruction to the next in the caches; they are counted by themselves, for the parts that do little else than move
them. Flops are those of matrix products: a multiplication and an addition are two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.model.architecture import Architecture, Attention, Block, Experts, Group
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

LINEARS = ("qkv", "o", "gate_up", "down")
"""The groups of a block's linears, in its order; without a gate, up alone; of experts, those of all together."""
KERNELS = (*LINEARS, "head", "attention", "deltas", "norms", "rotation", "gate")
"""The parts of a step that kernels run; norms include sums, scales, and the copy of the rows that need logits."""
CHOOSING = "choosing"

NF4_BYTES = 1 / 2 + 1 / BLOCK_SIZE + 4 / (BLOCK_SIZE * NESTED_BLOCK_SIZE)
"""Of a weight: its code, and its part of a scale in a byte, and of that one's in a float32."""
FLOAT32 = 4
STORED = 2
"""Bytes of a value of the cells and the adapters, and of the head where it has no fast weights, in bfloat16."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes from and to memory, flops, and bytes that pass in the caches, which no limit counts."""

    num_bytes: float = 0.0
    flops: float = 0.0
    cached_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.num_bytes + other.num_bytes,
            self.flops + other.flops,
            self.cached_bytes + other.cached_bytes,
        )

    def limit_s(self, read_rate: float, flop_rate: float) -> float:
        """The least time it can take, at bytes and flops per second."""
        return max(self.num_bytes / read_rate, self.flops / flop_rate)


def step_costs(
    architecture: Architecture, plan: StepPlan, rank: int, *, head_bytes: float = STORED
) -> Mapping[str, Cost]:
    """Part → what it costs in one step.

    Args:
        architecture: the model's.
        plan: the step's; rows with a slot have a LoRA on all linears.
        rank: of each.
        head_bytes: of a weight of the head.
    """
    num_rows, num_logit_rows = plan.num_rows, len(plan.logit_rows)
    hidden, vocabulary = architecture.hidden_size, architecture.vocab_size
    logits = FLOAT32 * num_logit_rows * vocabulary
    costs = dict.fromkeys((*KERNELS, CHOOSING), Cost())
    costs["head"] = Cost(head_bytes * hidden * vocabulary + logits, 2 * num_logit_rows * hidden * vocabulary)
    costs[CHOOSING] = Cost(logits)
    costs["norms"] = _moved(2 * num_logit_rows * hidden)
    if architecture.blocks[0].around_attention.before is not None:
        costs["norms"] += _moved(2 * num_rows * hidden)
    for block in architecture.blocks:
        experts, num_passes = block.feed_forward.experts, num_rows
        groups = (*block.attention_groups(), *(block.feed_forward_groups() if experts is None else ()))
        for part, group in zip(LINEARS, groups, strict=experts is None):
            costs[part] += _linear(group, num_rows)
            costs["deltas"] += _deltas(group, plan, rank)
        costs["attention"] += _attention(block.attention, plan)
        costs["norms"] += _moved(num_rows * _normed_values(block))
        costs["rotation"] += _rotation(block.attention, num_rows)
        if experts is not None:
            num_passes = num_rows * experts.num_per_row
            for part, cost in _mixture(block, experts, num_rows).items():
                costs[part] += cost
        costs["gate"] += _moved((2 + block.feed_forward.is_gated) * num_passes * block.feed_forward.width)
    return costs


def _mixture(block: Block, experts: Experts, num_rows: int) -> Mapping[str, Cost]:
    """Of experts, as many are read as rows can have; each row's input is copied to them, and their outputs summed."""
    num_pairs, num_read = num_rows * experts.num_per_row, min(num_rows * experts.num_per_row, experts.num)
    costs = {}
    for part, group in zip(LINEARS[2:], block.feed_forward_groups(0), strict=True):
        each = _linear(group, 1)
        costs[part] = Cost(num_read * each.num_bytes, num_pairs * each.flops)
    num_weights = block.hidden_size * experts.num
    costs["gate_up"] += Cost(STORED * num_weights, 2 * num_rows * num_weights)
    costs["gate"] = _moved((4 * num_pairs + num_rows) * block.hidden_size)
    return costs


def _moved(num_activations: int) -> Cost:
    return Cost(cached_bytes=FLOAT32 * num_activations)


def _linear(group: Group, num_rows: int) -> Cost:
    num_weights = group.d_in * group.d_out
    num_biases = sum(member.d_out for member in group.members if member.has_bias)
    return Cost(NF4_BYTES * num_weights + FLOAT32 * num_biases, 2 * num_rows * num_weights)


def _deltas(group: Group, plan: StepPlan, rank: int) -> Cost:
    """Each adapter's matrices are read once, however many rows have it."""
    num_values = sum(rank * (member.d_in + member.d_out) for member in group.members)
    slots = plan.row_slots[plan.row_slots != 0]
    return Cost(STORED * num_values * len(np.unique(slots)), 2 * num_values * len(slots))


def _attention(attention: Attention, plan: StepPlan) -> Cost:
    """Scores and sums of each row over what it sees; each sequence's cells that any of its rows sees are read once."""
    num_cells = num_seen = 0
    for count, end in zip(np.diff(plan.query_start).tolist(), plan.context_len.tolist(), strict=True):
        window = attention.window or end
        ends = np.arange(end - count + 1, end + 1)
        num_seen += int(np.minimum(ends, window).sum())
        num_cells += min(end, window + count - 1)
    return Cost(
        2 * STORED * num_cells * attention.key_size,
        4 * num_seen * attention.query_size,
    )


def _rotation(attention: Attention, num_rows: int) -> Cost:
    """Queries and keys are rotated in place; keys and values go into cells."""
    rotated = 2 * (attention.query_size + attention.key_size) + attention.key_size
    cells = 2 * STORED * attention.key_size
    return Cost(num_bytes=num_rows * cells, cached_bytes=FLOAT32 * num_rows * rotated)


def _normed_values(block: Block) -> int:
    """Values of a row that norms, sums and scales read or write.

    Each sub-layer's output is added to the stream, whose norm is the next input.
    """
    hidden, attention = block.hidden_size, block.attention
    values = 2 * 4 * hidden
    for around in (block.around_attention, block.around_feed_forward):
        values += 2 * hidden * ((around.output is not None) + (block.residual_scale != 1.0))
    if attention.query_norm is not None and attention.key_norm is not None:
        values += 2 * (attention.query_size + attention.key_size)
    return values
