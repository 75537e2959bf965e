"""A mixture of experts in place of a layer's feed-forward: what ``model.forward`` has for one, without waiting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from manyhats.adapters.sites import ROUTER
from manyhats.engine.backends.cuda.activations import activate
from manyhats.engine.backends.cuda.adapters.deltas import change_outputs
from manyhats.engine.backends.cuda.adapters.experts import change_experts
from manyhats.engine.backends.cuda.adapters.layout import RecordLayout
from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace, split_of
from manyhats.engine.backends.cuda.experts.linear import ExpertLinears, expert_linear, pack_experts
from manyhats.engine.backends.cuda.experts.routing import (
    SortedPairs,
    choose_experts,
    combine,
    route,
    sort_pairs,
)
from manyhats.engine.model.architecture import Block, Experts, FeedForward, Group
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear

_LEAST_ROWS = 16
"""Of a tile of pairs."""


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """A layer's experts on the device.

    Attributes:
        router: [E, D] float32.
        first: before the activation. down: behind it.
    """

    router: Tensor
    first: ExpertLinears
    down: ExpertLinears

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self.router.nbytes + self.first.num_bytes + self.down.num_bytes


def pack_mixture(spec: Block, linears: Mapping[str, Linear], sm: int, device: torch.device) -> Mixture:
    """The linears of a layer's mixture, by name.

    Raises:
        ModelError: the kernels cannot run them.
    """
    experts = _experts_of(spec)
    groups = [spec.feed_forward_groups(expert) for expert in range(experts.num)]

    def packed(own: list[Group]) -> ExpertLinears:
        name = own[0].names[0].partition(".")[0]
        return pack_experts(name, [[linears[each] for each in group.names] for group in own], sm, device)

    matrix = linears[ROUTER].matrix
    router = matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix.float()
    first, down = ([of_expert[index] for of_expert in groups] for index in range(2))
    return Mixture(router.to(device).contiguous(), packed(first), packed(down))


@dataclass(frozen=True, slots=True, eq=False)
class MixtureBuffers:
    """What a mixture works in; the same memory for every layer.

    Attributes:
        routed: float32, the router's sums.
        chosen: [rows, k] int32, each row's experts. shares: [rows, k] float32, what each weighs.
        pairs: of all rows. of_adapters: of the rows with an adapter.
        gate_up: [rows · k, I or 2 · I] bfloat16.
        inside: [rows · k, I] bfloat16.
        outputs: [rows · k, D] float32.
    """

    routed: Tensor
    chosen: Tensor
    shares: Tensor
    pairs: SortedPairs
    of_adapters: SortedPairs
    gate_up: Tensor
    inside: Tensor
    outputs: Tensor

    @classmethod
    def of(
        cls, feed_forward: FeedForward, hidden_size: int, num_rows: int, device: torch.device
    ) -> MixtureBuffers:
        """For steps of so many rows."""
        experts = feed_forward.experts
        assert experts is not None
        num_pairs = num_rows * experts.num_per_row

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            routed=empty(split_of(hidden_size)[0] * num_rows * experts.num),
            chosen=empty(num_rows, experts.num_per_row, dtype=torch.int32),
            shares=empty(num_rows, experts.num_per_row),
            pairs=SortedPairs.room(num_pairs, experts.num, _LEAST_ROWS, device),
            of_adapters=SortedPairs.room(num_pairs, experts.num, SEGMENT_ROWS, device),
            gate_up=empty(num_pairs, feed_forward.width * (1 + feed_forward.is_gated), dtype=torch.bfloat16),
            inside=empty(num_pairs, feed_forward.width, dtype=torch.bfloat16),
            outputs=empty(num_pairs, hidden_size),
        )

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        values = [getattr(self, field.name) for field in fields(self)]
        sorted_pairs = [(each.pairs, each.tiles) for each in (self.pairs, self.of_adapters)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*tensors, *(part for each in sorted_pairs for part in each)))


def mix(
    layer: int,
    spec: Block,
    mixture: Mixture,
    step: StepAdapters,
    layout: RecordLayout,
    x: Tensor,
    out: Tensor,
    buffers: MixtureBuffers,
    work: Workspace,
) -> None:
    """Launches ``out = Σ share · expert(x)`` over each row's experts, with the rows' adapters.

    Args:
        layer: of the model.
        spec: the layer.
        mixture: its weights.
        step: the step's adapters.
        layout: of their records.
        x: [N, D] bfloat16, contiguous.
        out: [N, D] float32, contiguous; written.
        buffers: for at least N rows.
        work: of adapters.
    """
    experts, feed_forward = _experts_of(spec), spec.feed_forward
    num_rows = x.shape[0]
    if num_rows == 0:
        return
    num_pairs = num_rows * experts.num_per_row
    chosen, shares = buffers.chosen[:num_rows], buffers.shares[:num_rows]
    gate_up, inside, outputs = (
        each[:num_pairs] for each in (buffers.gate_up, buffers.inside, buffers.outputs)
    )
    parts = route(x, mixture.router, buffers.routed)
    # A delta goes to one range of the sum, and with that into all of it.
    change_outputs(step, layout.group(layer, ROUTER), x, parts[0], work)
    choose_experts(parts, experts, chosen, shares)
    tile = mixture.first.tile(num_pairs)
    pairs = sort_pairs(chosen, experts.num, tile.rows, buffers.pairs)
    own = None
    if step.acting.expert_rank:
        own = sort_pairs(chosen, experts.num, SEGMENT_ROWS, buffers.of_adapters, step)
    table, first_names = layout.expert_table(layer), ("gate_proj", "up_proj")[1 - feed_forward.is_gated :]
    expert_linear(x, mixture.first, pairs, gate_up, tile)
    if own is not None:
        change_experts(step, table, own, first_names, x, gate_up, work)
    activate(gate_up, feed_forward, inside)
    expert_linear(inside, mixture.down, pairs, outputs, tile)
    if own is not None:
        change_experts(step, table, own, ("down_proj",), inside, outputs, work)
    combine(outputs, shares, out)


def _experts_of(spec: Block) -> Experts:
    experts = spec.feed_forward.experts
    assert experts is not None, "the layer is no mixture"
    return experts
