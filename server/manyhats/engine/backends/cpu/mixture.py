"""A mixture of experts as instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional

from manyhats.adapters.sites import ROUTER
from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.adapters.slots import padded_size
from manyhats.engine.backends.cpu.building import (
    CONVERTED,
    MIXED,
    OUTPUT,
    PAIRED,
    PAIRS,
    ROUTED,
    ROUTES,
    WIDE,
    Building,
)
from manyhats.engine.backends.cpu.experts import words_of_pairs, words_of_routes
from manyhats.engine.backends.cpu.packing import Array, CpuLinear
from manyhats.engine.model.architecture import Block, Experts
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Linear, Matrix


def add_mixture(
    to: Building,
    layer: int,
    block: Block,
    experts: Experts,
    activation: int,
    linears: Mapping[str, list[Linear]],
    hidden: int,
) -> None:
    """Adds what ``model.forward`` has for a mixture, for the pairs of all rows and their experts at once.

    Args:
        to: what is being built.
        layer: of the model.
        block: that layer.
        experts: its own.
        activation: the instruction.
        linears: of the layer, by group.
        hidden: the buffer of its input; the output goes to OUTPUT.
    """
    size, width, count = block.hidden_size, block.feed_forward.width, experts.num_per_row
    is_gated = block.feed_forward.is_gated
    groups = [block.feed_forward_groups(expert) for expert in range(experts.num)]
    inside, behind = (
        _pack_alike(to, [linears[group.name] for group in of_experts])
        for of_experts in zip(*groups, strict=True)
    )
    num_inside, words = inside[0].out_features, inside[0].converted_size or size
    for buffer, values in ((PAIRED, max(words, size)), (WIDE, num_inside), (MIXED, width)):
        to.need(buffer, count * values)
    num_used = _route(to, layer, experts, linears[ROUTER], hidden)
    source = _converted(to, inside[0], hidden, col.NUM_ROWS, 1)
    to.program.spread(source, PAIRED, words, PAIRS, experts)
    to.program.expert_linear(PAIRED, WIDE, inside, PAIRS, num_used)
    members, sizes = range(1 - is_gated, 2), (size, num_inside)
    to.program.expert_deltas(hidden, WIDE, sizes, layer, members, False, ROUTES, experts)
    to.program.activate(activation, WIDE, MIXED, width, is_gated, col.NUM_PAIRS)
    source = _converted(to, behind[0], MIXED, col.NUM_PAIRS, count)
    to.program.expert_linear(source, PAIRED, behind, PAIRS, num_used)
    to.program.expert_deltas(MIXED, PAIRED, (width, size), layer, range(2, 3), True, ROUTES, experts)
    to.program.combine(PAIRED, OUTPUT, size, ROUTES, experts)


def _route(to: Building, layer: int, experts: Experts, linears: Sequence[Linear], hidden: int) -> Array:
    """Each row's experts, and the pairs of both; returns what holds how many experts have pairs."""
    to.num_per_row = experts.num_per_row
    to.need(ROUTES, words_of_routes(experts.num_per_row))
    to.need(PAIRS, words_of_pairs(experts.num, experts.num_per_row))
    padding = padded_size(experts.num) - experts.num
    router = Linear(functional.pad(_dense(linears[0].matrix).float(), (0, 0, 0, padding)))
    size = to.linear(ROUTER, layer, [router], hidden, ROUTED)
    to.program.route(ROUTED, ROUTES, size, experts)
    return to.program.pair(ROUTES, PAIRS, experts)


def _converted(to: Building, packed: CpuLinear, source: int, rows: int, count: int) -> int:
    """The buffer of a linear's inputs, of which there are ``count`` a row, as it takes them."""
    if not packed.converted_size:
        return source
    to.need(CONVERTED, count * packed.converted_size)
    to.program.convert(source, CONVERTED, packed, rows)
    return CONVERTED


def _pack_alike(to: Building, of_experts: Sequence[list[Linear]]) -> list[CpuLinear]:
    """The same linears of each expert, so that all take the same inputs."""
    if not all(isinstance(each.matrix, Nf4Weight) for linears in of_experts for each in linears):
        of_experts = [[Linear(_dense(each.matrix), each.bias) for each in linears] for linears in of_experts]
    return [to.pack(linears) for linears in of_experts]


def _dense(matrix: Matrix) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, Nf4Weight) else matrix
