"""Mixtures of experts: their linears, their adapters, and the whole in place of a feed-forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters import equations
from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.primitives import Delta, LowRank
from manyhats.adapters.sites import ROUTER, Site, expert_linear
from manyhats.engine.backends.cuda.adapters.experts import change_experts
from manyhats.engine.backends.cuda.adapters.segments import SEGMENT_ROWS
from manyhats.engine.backends.cuda.experts.linear import ExpertLinears, pack_experts
from manyhats.engine.backends.cuda.experts.linear import expert_linear as run_linear
from manyhats.engine.backends.cuda.experts.mixture import MixtureBuffers, mix, pack_mixture
from manyhats.engine.backends.cuda.experts.routing import SortedPairs, sort_pairs
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Architecture, Experts
from manyhats.engine.model.forward import routed
from manyhats.engine.model.weights import Linear
from support.gpu.adapters import NOTHING, Served, normal, odd_architecture, off
from support.gpu.compiling import faults_of
from support.gpu.linears import definition, nf4_linears, poisoned, random, rounded
from support.gpu.no_sync import no_sync

HIDDEN, WIDTH, LAYER, NUM, TOP = 64, 128, 1, 5, 2


def mixture(*, renormalizes: bool = True, is_gated: bool = True) -> Architecture:
    """Five experts in the second of two layers, of which a row has two."""
    plain = odd_architecture(hidden_size=HIDDEN, width=WIDTH)
    first, second = plain.blocks
    feed_forward = replace(second.feed_forward, experts=Experts(NUM, TOP, renormalizes), is_gated=is_gated)
    return replace(plain, blocks=(first, replace(second, feed_forward=feed_forward)))


def some_chosen(num_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    each = [torch.randperm(NUM, generator=generator)[:TOP].sort().values for _ in range(num_rows)]
    return torch.stack(each).int().to(DEVICE)


def pairs_of(chosen: Tensor, size: int) -> SortedPairs:
    room = SortedPairs.room(chosen.numel(), NUM, size, torch.device(DEVICE))
    return sort_pairs(chosen, NUM, size, room)


def experts_of(kind: str) -> list[list[Linear]]:
    sizes = (72, 40)
    if kind == "dense":
        return [
            [Linear(random(size, HIDDEN, seed=10 * expert + size).bfloat16()) for size in sizes]
            for expert in range(NUM)
        ]
    return [nf4_linears(sizes, HIDDEN, seed=10 * expert, is_nested=kind == "nested") for expert in range(NUM)]


def run_experts(linears: ExpertLinears, x: Tensor, chosen: Tensor) -> Tensor:
    tile = linears.tile(chosen.numel())
    y = poisoned(chosen.numel(), linears.out_features)
    with no_sync():
        run_linear(x, linears, pairs_of(chosen, tile.rows), y, tile)
    return y


@pytest.mark.parametrize("of_pairs", [False, True])
@pytest.mark.parametrize("kind", ["nested", "plain", "dense"])
def test_each_pair_is_multiplied_by_its_experts_weights(kind: str, of_pairs: bool) -> None:
    own, num_rows = experts_of(kind), 9
    linears, chosen = pack_experts("experts", own, 90, torch.device(DEVICE)), some_chosen(num_rows)
    x = normal(1, num_rows * (TOP if of_pairs else 1), HIDDEN).bfloat16()
    if of_pairs:
        x = x.view(num_rows, TOP, HIDDEN).flatten(0, 1)
    found = run_experts(linears, x, chosen)
    for pair, expert in enumerate(chosen.flatten().tolist()):
        source = x[pair if of_pairs else pair // TOP]
        assert off(found[pair], definition(source[None], own[expert])[0]) <= 1e-6, pair


def test_a_pair_has_the_same_bits_in_any_tile() -> None:
    linears = pack_experts("experts", experts_of("nested"), 90, torch.device(DEVICE))
    chosen, x = some_chosen(90), normal(1, 90, HIDDEN).bfloat16()
    together = run_experts(linears, x, chosen)
    assert linears.tile(chosen.numel()).rows > linears.tile(2).rows
    for row in (0, 41, 89):
        alone = run_experts(linears, x[row : row + 1], chosen[row : row + 1])
        assert torch.equal(alone, together[TOP * row : TOP * row + TOP])


def test_experts_of_unlike_kinds_are_made_alike() -> None:
    mixed = [experts_of("dense" if expert == 2 else "nested")[expert] for expert in range(NUM)]
    unlike = [experts_of("plain" if expert == 2 else "nested")[expert] for expert in range(NUM)]
    chosen, x = some_chosen(4), normal(1, 4, HIDDEN).bfloat16()
    for own in (mixed, unlike):
        found = run_experts(pack_experts("experts", own, 90, torch.device(DEVICE)), x, chosen)
        for pair, expert in enumerate(chosen.flatten().tolist()):
            assert off(found[pair], definition(x[pair // TOP][None], own[expert])[0]) <= 1e-6


def test_biases_of_experts_are_refused_by_name() -> None:
    own = nf4_linears((72,), HIDDEN, biased=1)
    with pytest.raises(ModelError, match=r"experts\.0: .*biases"):
        pack_experts("experts.0", [own], 90, torch.device(DEVICE))


def low_rank(expert: int, name: str, rank: int, seed: int) -> LowRank:
    size, d_in = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
    site = Site(LAYER, expert_linear(expert, name))
    return LowRank(site, normal(seed, rank, d_in), normal(seed + 1, size, rank, scale=0.3), 0.25)


ADAPTERS: list[list[Delta]] = [
    [
        low_rank(expert, name, 3 + expert, 10 * expert + member)
        for expert in range(NUM)
        for member, name in enumerate(("gate_proj", "up_proj", "down_proj"))
    ],
    [low_rank(1, "up_proj", 19, 70), low_rank(3, "down_proj", 2, 72)],
    [LowRank(Site(LAYER, ROUTER), normal(80, 4, HIDDEN), normal(81, NUM, 4), 0.05)],
]
"""Every linear of every expert; some of them; the router alone."""
ROW_SLOTS = [2, 0, 1, *[1] * 18, 2, 3, 0, 2]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(ADAPTERS, mixture())


@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("up_proj",), ("down_proj",)])
def test_each_pair_gets_its_adapters_deltas_on_its_expert(served: Served, names: tuple[str, ...]) -> None:
    is_behind = names == ("down_proj",)
    num_rows, (d_in, d_out) = len(ROW_SLOTS), (WIDTH, HIDDEN) if is_behind else (HIDDEN, WIDTH)
    x = normal(1, num_rows * (TOP if is_behind else 1), d_in).bfloat16()
    y, chosen = normal(2, num_rows * TOP, d_out * len(names)), some_chosen(num_rows)
    found, step, work = y.clone(), served.step(ROW_SLOTS, slack=2), served.workspace(num_rows + 2)
    with no_sync():
        room = SortedPairs.room(TOP * step.max_rows, NUM, SEGMENT_ROWS, torch.device(DEVICE))
        own = sort_pairs(chosen, NUM, SEGMENT_ROWS, room, step)
        change_experts(step, served.layout.expert_table(LAYER), own, names, x, found, work)
    right = y.double()
    for pair, expert in enumerate(chosen.flatten().tolist()):
        held = served.torch.get(ROW_SLOTS[pair // TOP], NOTHING)
        source = x[pair if is_behind else pair // TOP].double()
        for part, name in enumerate(names):
            for delta in held.at(Site(LAYER, expert_linear(expert, name)), LowRank):
                columns = slice(part * d_out, (part + 1) * d_out)
                right[pair, columns] += equations.low_rank(
                    source, delta.a.double(), delta.b.double(), delta.scale
                )
    changed = (right != y).any(1)
    assert 0 < changed.sum() < len(right)
    assert torch.equal(found[~changed], y[~changed])
    assert off(found[changed] - y[changed], right[changed] - y[changed]) <= 3e-3


def weights_of(spec: Architecture) -> dict[str, Linear]:
    linears = {ROUTER: Linear(random(NUM, HIDDEN, seed=3))}
    for seed, linear in enumerate(spec.blocks[LAYER].linears()):
        if linear.name.startswith("experts."):
            linears[linear.name] = nf4_linears((linear.d_out,), linear.d_in, seed=seed)[0]
    return linears


def mixed(served: Served, weights: dict[str, Linear], row_slots: list[int], x: Tensor) -> Tensor:
    spec, step = served.architecture.blocks[LAYER], served.step(row_slots)
    packed = pack_mixture(spec, weights, 90, torch.device(DEVICE))
    buffers = MixtureBuffers.of(spec.feed_forward, HIDDEN, len(row_slots), torch.device(DEVICE))
    out, work = poisoned(len(row_slots), HIDDEN), served.workspace(len(row_slots))
    with no_sync():
        mix(LAYER, spec, packed, step, served.layout, x, out, buffers, work)
    return out


def expected(served: Served, weights: dict[str, Linear], row: int, slot: int, x: Tensor) -> Tensor:
    """One row in float64, but for what is rounded to bfloat16 between the linears."""
    held, feed_forward = served.torch.get(slot, NOTHING), served.architecture.blocks[LAYER].feed_forward
    assert feed_forward.experts is not None

    def linear(name: str, source: Tensor) -> Tensor:
        matrix = weights[name].matrix if name == ROUTER else rounded(weights[name])
        assert isinstance(matrix, Tensor)
        y = matrix.double().to(DEVICE) @ source
        for delta in held.at(Site(LAYER, name), LowRank):
            y = y + equations.low_rank(source, delta.a.double(), delta.b.double(), delta.scale)
        return y

    source = x[row].double()
    chosen, shares = routed(linear(ROUTER, source).float()[None], feed_forward.experts)
    total = torch.zeros(HIDDEN, dtype=torch.float64, device=DEVICE)
    for expert, share in zip(chosen[0].tolist(), shares[0].double(), strict=True):
        names = ("up_proj", "gate_proj") if feed_forward.is_gated else ("up_proj",)
        up, *gate = (rounded_off(linear(expert_linear(expert, name), source)) for name in names)
        activation = ACTIVATIONS[feed_forward.activation]
        inside = activation(gate[0]) * up if gate else activation(up)
        total += share * linear(expert_linear(expert, "down_proj"), rounded_off(inside))
    return total


def rounded_off(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("is_gated", [True, False])
def test_a_mixture_is_that_of_the_model(is_gated: bool) -> None:
    architecture = mixture(renormalizes=not is_gated, is_gated=is_gated)
    adapters = [
        [delta for delta in deltas if is_gated or "gate_proj" not in delta.site.name]  # type: ignore[union-attr]
        for deltas in ADAPTERS
    ]
    served, weights = Served(adapters, architecture), weights_of(architecture)
    x = normal(1, len(ROW_SLOTS), HIDDEN).bfloat16()
    found = mixed(served, weights, ROW_SLOTS, x)
    for row, slot in enumerate(ROW_SLOTS):
        assert off(found[row], expected(served, weights, row, slot, x)) <= 8e-3, (row, slot)


def test_a_row_has_the_same_bits_alone_and_in_any_step(served: Served) -> None:
    weights, x = weights_of(served.architecture), normal(1, len(ROW_SLOTS), HIDDEN).bfloat16()
    together = mixed(served, weights, ROW_SLOTS, x)
    for row in (0, 1, 2, 22):
        only = slice(row, row + 1)
        assert torch.equal(mixed(served, weights, [ROW_SLOTS[row]], x[only]), together[only])


def test_the_kernels_of_mixtures_compile() -> None:
    assert faults_of("support.gpu.entries.experts") == []
