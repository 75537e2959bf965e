"""Slots of adapters: what is packed, placed and cleared, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingRows,
    Gate,
    HeadRows,
    InputScale,
    LayerNorm,
    LoweredAdapter,
    LowRank,
    PrefixGate,
)
from manyhats.adapters.sites import HEAD, PROJECTION, Site
from manyhats.engine.backends.cuda.adapters import deltas
from manyhats.engine.backends.cuda.adapters.acting import Acting
from manyhats.engine.backends.cuda.adapters.slots import CudaAdapterSlots
from manyhats.engine.backends.cuda.arena import ArenaFullError
from manyhats.engine.backends.cuda.record import (
    BottleneckWord,
    EmbeddingWord,
    HeadWord,
    LinearWord,
    PrefixWord,
)
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import COUPLINGS, Architecture, Experts, Norm
from support.gpu.adapters import LARGEST, Served, normal, odd_architecture

HIDDEN = 40
GATE = Gate(torch.zeros(1, HIDDEN), torch.zeros(1))


def lora(name: str = "q_proj", rank: int = 4, d_out: int = 48) -> LowRank:
    return LowRank(Site(1, name), normal(rank, rank, HIDDEN), normal(rank + 1, d_out, rank), 0.5)


def bottleneck(site: Site = Site(1, "attention"), size: int = 3) -> Bottleneck:  # noqa: B008 - frozen
    return Bottleneck(
        site,
        BottleneckInput.OUTPUT,
        normal(1, size, HIDDEN),
        normal(2, size),
        normal(3, HIDDEN, size),
        normal(4, HIDDEN),
        "relu",
        torch.ones(1),
    )


def new_slots(architecture: Architecture | None = None, *, num_bytes: int = 1 << 18) -> CudaAdapterSlots:
    return CudaAdapterSlots(architecture or odd_architecture(), 4, num_bytes, LARGEST, torch.device(DEVICE))


def pack(slots: CudaAdapterSlots, *deltas: Delta) -> None:
    slots.pack(LoweredAdapter("x", deltas))


def mixture() -> Architecture:
    """Six experts in the second of two layers."""
    plain = odd_architecture()
    first, second = plain.blocks
    feed_forward = replace(second.feed_forward, experts=Experts(6, 2, renormalizes=True))
    return replace(plain, blocks=(first, replace(second, feed_forward=feed_forward)))


def expert_lora(name: str = "experts.2.up_proj", rank: int = 3, d_in: int = 40, d_out: int = 72) -> LowRank:
    return LowRank(Site(1, name), normal(rank, rank, d_in), normal(rank + 1, d_out, rank), 0.5)


def scale_of(name: str, size: int = HIDDEN, seed: int = 5) -> InputScale:
    return InputScale(Site(1, name), normal(seed, size))


REFUSED: dict[str, tuple[list[Delta], str]] = {
    "gate of two": (
        [replace(lora(), gate=GATE), Affine(Site(1, "q_proj"), normal(1, 48), None)],
        "layer 1 q_proj: .*gate",
    ),
    "gated head": ([LowRank(HEAD, normal(1, 2, 40), normal(2, 70, 2), 1.0, GATE)], "lm_head: .*gate"),
    "two gated prefixes": ([PrefixGate(Site(1, "prefix"), GATE)] * 2, "layer 1 prefix: one gate"),
    "layer's output": ([bottleneck(Site(1, "output"))], "layer 1 output: the base has no such place"),
    "coupling": ([bottleneck(Site(-1, "first_coupling"))], "first_coupling: the base has no such place"),
    "activation": ([replace(bottleneck(), activation="prelu")], "layer 1 attention: .*'prelu'"),
    "norm that is not there": (
        [replace(bottleneck(), input=BottleneckInput.NORMED)],
        "layer 1 attention: reads a norm",
    ),
    "no such expert": ([expert_lora("experts.6.up_proj")], "layer 1 experts.6.up_proj"),
    "linear of a mixture": ([expert_lora()], "layer 1 experts.2.up_proj"),
    "router": ([LowRank(Site(1, "router"), normal(1, 2, 40), normal(2, 8, 2), 1.0)], "layer 1 router"),
    "projection": (
        [LowRank(Site(-1, "embedding_projection"), normal(1, 2, 40), normal(2, 40, 2), 1.0)],
        "embedding_projection",
    ),
    "large rank": ([lora(rank=49)], "layer 1 q_proj: its rank is 49; .*48"),
    "large head rank": (
        [LowRank(HEAD, normal(1, 49, 40), normal(2, 70, 49), 1.0)],
        "lm_head: its rank is 49",
    ),
    "large bottleneck": ([bottleneck(size=49)], "layer 1 attention: its size is 49; .*48"),
    "two low ranks": ([lora(), lora(rank=2)], "layer 1 q_proj: one low-rank delta"),
    "two scales": (
        [Affine(Site(1, "q_proj"), normal(1, 48), None)] * 2,
        "layer 1 q_proj: one scale and offset",
    ),
    "large expert rank": ([expert_lora(rank=49)], "layer 1 experts.2.up_proj: its rank is 49"),
    "two of an expert": ([expert_lora()] * 2, "layer 1 experts.2.up_proj: one low-rank delta"),
    "two input scales": ([scale_of("down_proj", 72)] * 2, "layer 1 down_proj: one scale of the input"),
    "two bottlenecks": ([bottleneck(), bottleneck(size=2)], "layer 1 attention: one bottleneck"),
    "two embeddings": (
        [EmbeddingRows(torch.tensor([1]), normal(1, 1, 40))] * 2,
        "embed_tokens: one set of rows",
    ),
    "two heads": ([HeadRows(torch.tensor([1]), normal(1, 1, 40))] * 2, "lm_head: one set of rows"),
}


NOT_OF_A_MIXTURE = ("linear of a mixture", "router")


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_cannot_run_is_refused_by_name(case: str) -> None:
    deltas, reason = REFUSED[case]
    slots = new_slots(None if case in NOT_OF_A_MIXTURE else mixture())
    with pytest.raises(ModelError, match=reason):
        pack(slots, *deltas)


def test_an_input_that_all_its_linears_rescale_alike_is_served() -> None:
    slots = new_slots()
    packed = slots.pack(LoweredAdapter("x", (scale_of("gate_proj"), scale_of("up_proj"))))
    assert packed.acting == Acting(inputs=frozenset(("gate_up",)))
    assert np.flatnonzero(packed.record).size == 0
    assert packed.addresses.tolist() == [slots.layout.group(1, "gate_up").input_scale]


@pytest.mark.parametrize(
    "deltas",
    [
        [scale_of("up_proj")],
        [scale_of("up_proj"), scale_of("gate_proj", seed=6)],
        [scale_of("up_proj"), scale_of("gate_proj"), lora("up_proj", d_out=72)],
    ],
    ids=["of one", "unequal", "beside a low rank"],
)
def test_other_inputs_are_rescaled_for_their_own_linears(deltas: list[Delta]) -> None:
    slots = new_slots()
    packed = slots.pack(LoweredAdapter("x", tuple(deltas)))
    scales = [delta.site for delta in deltas if isinstance(delta, InputScale)]
    assert packed.acting.scaled == frozenset(site.name for site in scales)
    assert not packed.acting.inputs
    words = {slots.layout.linear(site) + LinearWord.INPUT for site in scales}
    assert words <= set(packed.addresses.tolist())


def test_in_a_parallel_block_attention_and_feed_forward_share_an_input() -> None:
    plain = odd_architecture()
    parallel = replace(
        plain,
        blocks=tuple(
            replace(block, is_parallel=True, around_feed_forward=type(block.around_feed_forward)())
            for block in plain.blocks
        ),
    )
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    slots = new_slots(parallel)
    some = slots.pack(LoweredAdapter("x", (scale_of("gate_proj"), scale_of("up_proj"))))
    assert some.acting == Acting(scaled=frozenset(("gate_proj", "up_proj")))
    packed = slots.pack(LoweredAdapter("x", tuple(scale_of(name) for name in names)))
    assert packed.addresses.tolist() == [slots.layout.group(1, "qkv").input_scale]


def every_kind_of_place() -> Architecture:
    """An encoder with a mixture, whose embeddings are normed, and narrower than its layers."""
    plain = mixture()
    blocks = tuple(
        replace(block, attention=replace(block.attention, sees_all=True)) for block in plain.blocks
    )
    return replace(plain, blocks=blocks, embedding=replace(plain.embedding, size=24, norm=Norm(1e-5)))


@pytest.mark.parametrize("architecture", [odd_architecture(), every_kind_of_place()], ids=["plain", "all"])
def test_words_of_different_places_do_not_overlap(architecture: Architecture) -> None:
    """Whatever acts anywhere has words of its own, and together they are the record."""
    layout = new_slots(architecture).layout
    places = [
        (layout.embedding, len(EmbeddingWord)),
        (layout.head_weight, len(HeadWord)),
        (layout.head_rows, len(HeadWord)),
        (layout.head_low_rank, len(LinearWord)),
    ]
    for name, (num_layers, _) in architecture.stream_places().items():
        layers = (-1,) if name in COUPLINGS else range(num_layers)
        places += [(layout.place(Site(layer, name)).word, len(BottleneckWord)) for layer in layers]
    for name, group in layout.groups.items():
        for layer in (-1,) if name == PROJECTION.name else (0, 1):
            places.append((layout.group(layer, name).input_scale, 1))
            places += [(layout.linear(Site(layer, member)), len(LinearWord)) for member in group.names]
    for layer in range(2):
        places.append((layout.prefix(layer), len(PrefixWord)))
        if layout.experts is not None:
            places.append((layout.expert_table(layer), 1))
    words = sorted(word for first, size in places for word in range(first, first + size))
    assert words == list(range(layout.num_words))


def test_experts_deltas_are_in_a_table_whose_addresses_count_from_it() -> None:
    slots = new_slots(mixture())
    deltas = (expert_lora(), expert_lora("experts.5.down_proj", 2, 72, 40), lora())
    packed = slots.pack(LoweredAdapter("x", deltas))
    assert packed.acting.expert_rank == 3
    word = slots.layout.expert_table(1)
    assert word in packed.addresses
    at = int(packed.record[word])
    table = packed.numbers[at : at + 6 * 3 * 4 * 8].view(torch.int64).view(6, 3, 4)
    for delta, own in ((deltas[0], table[2, 1]), (deltas[1], table[5, 2])):
        rank, size = delta.a.shape
        first_row = packed.numbers[at + int(own[0]) :][: 2 * size].view(torch.bfloat16)
        assert torch.equal(first_row, delta.a[0].bfloat16().cpu())
        assert int(own[2]) == rank
        assert own[3:].view(torch.float32)[0] == delta.scale
    assert table.count_nonzero() == 8


def test_an_empty_slots_record_is_zero_and_its_memory_free_again() -> None:
    slots = new_slots()
    free = slots.num_free_bytes
    packed = slots.pack(LoweredAdapter("x", (lora(), bottleneck())))
    for slot in (2, 3):
        slots.place(slot, packed)
    assert slots.num_free_bytes == free - 2 * -(-packed.numbers.numel() // 256) * 256
    assert slots.records[2].count_nonzero() == slots.records[3].count_nonzero() > 0
    for slot in (2, 3, 3):
        slots.clear(slot)
    assert slots.num_free_bytes == free
    assert not slots.records.any()


def test_an_adapter_that_does_not_fit_leaves_everything_as_it_was() -> None:
    slots = new_slots(num_bytes=4096)
    packed = slots.pack(LoweredAdapter("x", (lora(rank=20),)))
    with pytest.raises(ArenaFullError):
        slots.place(1, packed)
    assert slots.num_free_bytes == 4096
    assert not slots.records.any()
    small = slots.pack(LoweredAdapter("x", (Affine(Site(1, "q_proj"), normal(1, 48), None),)))
    slots.place(1, small)


def test_a_copy_that_fails_gives_its_memory_back() -> None:
    slots = new_slots()
    free = slots.num_free_bytes
    packed = slots.pack(LoweredAdapter("x", (lora(),)))
    with pytest.raises(RuntimeError):
        slots.place(1, replace(packed, record=packed.record[:-1]))
    assert slots.num_free_bytes == free
    slots.place(1, packed)


def test_an_adapter_serves_from_wherever_it_was_placed_last() -> None:
    """Cleared and placed again behind another, in memory that others have used."""
    served = Served([[lora()], [lora("k_proj", 9, 24)], [lora("v_proj", 7, 24)]])
    x, y = normal(1, 4, HIDDEN).bfloat16(), normal(2, 4, 96)

    def changed(row_slots: list[int]) -> torch.Tensor:
        step, found = served.step(row_slots), y.clone()
        deltas.change_outputs(step, served.layout.group(1, "qkv"), x, found, served.workspace(4))
        return found

    before = changed([1, 2, 3, 0])
    packed = {slot: served.slots._placed[slot][0] for slot in (1, 2, 3)}
    for slot in (1, 2, 3):
        served.slots.clear(slot)
    assert torch.equal(changed([1, 2, 3, 0]), y)
    for slot, own in ((3, 1), (1, 2), (2, 3)):
        served.slots.place(slot, packed[own])
    assert torch.equal(changed([3, 1, 2, 0]), before)


def test_a_step_is_told_the_most_of_what_its_own_adapters_do() -> None:
    after = LayerNorm(normal(1, HIDDEN), normal(2, HIDDEN))
    served = Served(
        [
            [lora(rank=5), Affine(Site(0, "down_proj"), normal(1, 40), None)],
            [lora(rank=9), replace(bottleneck(size=6), norm_after=after)],
            [
                HeadRows(torch.tensor([1, 4]), normal(1, 2, HIDDEN)),
                LowRank(HEAD, normal(3, 2, 40), normal(4, 70, 2), 1.0),
            ],
        ]
    )

    def acting(*row_slots: int) -> Acting:
        return served.slots.acting(AdapterRows.of(np.array(row_slots, np.int32)))

    assert acting(0, 0) == Acting()
    qkv, both, attention = (frozenset(names) for names in (("qkv",), ("qkv", "down"), ("attention",)))
    assert acting(1, 0) == Acting(rank=5, outputs=both)
    assert acting(1, 2, 1) == Acting(rank=9, outputs=both, bottleneck=6, sublayers=attention)
    assert acting(3, 2) == Acting(9, qkv, bottleneck=6, sublayers=attention, head_rows=2, head_rank=2)
    assert not acting(1, 2).changes_head
    assert acting(3).changes_head
