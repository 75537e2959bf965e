"""Gates of texts, against the torch backend's: the mean of a sigmoid over all rows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.primitives import Affine, Bottleneck, BottleneckInput, Delta, Gate, LowRank, PrefixGate
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters import bottlenecks, deltas
from manyhats.engine.backends.cuda.adapters.gates import find_gates
from manyhats.engine.backends.cuda.attention.attend import PrefixGates
from support.gpu.adapters import Served, normal, odd_architecture, off, outputs_of, sublayer_of
from support.gpu.no_sync import no_sync

HIDDEN, LAYER = 40, 1
SUBLAYER = Site(LAYER, "attention")


def gate(seed: int, count: int = 1, size: int = HIDDEN) -> Gate:
    return Gate(normal(seed, count, size, scale=size**-0.5), normal(seed + 1, count))


def low_rank(name: str, d_out: int, seed: int) -> LowRank:
    return LowRank(
        Site(LAYER, name), normal(seed, 5, HIDDEN), normal(seed + 1, d_out, 5), 0.5, gate(seed + 2)
    )


def bottleneck(seed: int, **settings: object) -> Bottleneck:
    plain = Bottleneck(
        SUBLAYER,
        BottleneckInput.OUTPUT,
        normal(seed, 6, HIDDEN),
        normal(seed + 1, 6),
        normal(seed + 2, HIDDEN, 6),
        normal(seed + 3, HIDDEN),
        "relu",
        torch.ones(1, device=DEVICE),
    )
    return replace(plain, gate=gate(seed + 4), **settings)  # type: ignore[arg-type]


ADAPTERS: list[list[Delta]] = [
    [
        low_rank("q_proj", 48, 1),
        replace(low_rank("v_proj", 24, 5), gate=None),
        PrefixGate(Site(LAYER, "prefix"), gate(9)),
        bottleneck(30),
    ],
    [
        Affine(Site(LAYER, "k_proj"), normal(11, 24), None, gate(12)),
        Affine(Site(LAYER, "q_proj"), None, normal(14, 48), gate(15)),
        bottleneck(40, input=BottleneckInput.SUM),
    ],
    [PrefixGate(Site(LAYER, "prefix"), gate(17, 2))],
    [PrefixGate(Site(0, "prefix"), gate(19))],
]
"""Gated low rank beside plain, and a prefix; gated factors; a prefix of unlike gates; nothing in this layer."""

TEXTS = [(1, 3), (0, 2), (2, 150), (1, 1), (3, 2), (4, 3), (2, 4)]
"""Slot and rows of each text; one is longer than what a program adds at a time."""


def rows_of(texts: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Each row's slot, and each text's first row."""
    starts = [0]
    for _, size in texts:
        starts.append(starts[-1] + size)
    return [slot for slot, size in texts for _ in range(size)], starts


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(ADAPTERS)


def changed(
    served: Served, texts: Sequence[tuple[int, int]], x: Tensor, y: Tensor, slack: int = 0
) -> tuple[Tensor, PrefixGates | None]:
    row_slots, starts = rows_of(texts)
    step, found = served.step(row_slots, slack=slack, starts=starts), y.clone()
    place, work = served.layout.group(LAYER, "qkv"), served.workspace(len(row_slots) + slack)
    with no_sync():
        gates = find_gates(step, place, x, work)
        deltas.change_outputs(step, place, x, found, work)
    return found, gates


def inputs(texts: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    num_rows = sum(size for _, size in texts)
    return normal(91, num_rows, HIDDEN).bfloat16(), normal(92, num_rows, 96)


def test_linears_are_changed_by_their_texts_gates(served: Served) -> None:
    (x, y), (row_slots, starts) = inputs(TEXTS), rows_of(TEXTS)
    found, _ = changed(served, TEXTS, x, y)
    right = outputs_of(served, LAYER, "qkv", row_slots, x, y, starts)
    for slot, tolerance in ((1, 3e-3), (2, 1e-6)):
        rows = torch.tensor(row_slots) == slot
        assert off(found[rows] - y[rows], right[rows] - y[rows]) <= tolerance
    rows = torch.tensor([slot in (0, 3, 4) for slot in row_slots])
    assert torch.equal(found[rows], y[rows])


def test_prefixes_have_their_texts_gates_and_other_texts_one(served: Served) -> None:
    x, y = inputs(TEXTS)
    _, gates = changed(served, TEXTS, x, y)
    assert gates is not None
    _, starts = rows_of(TEXTS)
    assert gates.query_start.tolist() == starts
    for text, (slot, size) in enumerate(TEXTS):
        own = served.torch[slot].at(Site(LAYER, "prefix"), PrefixGate) if slot else []
        right = torch.ones(2, device=DEVICE)
        if own:
            rows = x[starts[text] : starts[text] + size].double()
            right = torch.sigmoid(rows @ own[0].gate.weight.double().T + own[0].gate.bias.double()).mean(0)
        torch.testing.assert_close(
            gates.factors[text].double(), right.double().expand(2), rtol=1e-6, atol=1e-6
        )


def test_a_bottleneck_is_changed_by_the_gate_of_what_it_reads(served: Served) -> None:
    row_slots, starts = rows_of(TEXTS)
    r, m = normal(93, len(row_slots), HIDDEN), normal(94, len(row_slots), HIDDEN)
    found = m.clone()
    with no_sync():
        step = served.step(row_slots, starts=starts)
        bottlenecks.change_output(
            step, served.layout.place(SUBLAYER), r, found, served.workspace(len(row_slots))
        )
    right = sublayer_of(served, SUBLAYER, row_slots, r, m, starts=starts)
    for slot in (1, 2):
        rows = torch.tensor(row_slots) == slot
        assert off(found[rows] - m[rows], right[rows] - m[rows]) <= 5e-3, slot
    rows = torch.tensor([slot not in (1, 2) for slot in row_slots])
    assert torch.equal(found[rows], m[rows])


@settings(max_examples=4, deadline=None)
@given(
    texts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=4),
    slack=st.integers(1, 3),
)
def test_a_text_has_the_same_bits_alone_and_in_any_step(
    served: Served, texts: list[tuple[int, int]], slack: int
) -> None:
    (x, y), (_, starts), at = inputs(texts), rows_of(texts), len(texts) // 2
    together, gates = changed(served, texts, x, y, slack)
    own = slice(starts[at], starts[at + 1])
    alone, own_gates = changed(served, [texts[at]], x[own], y[own])
    assert torch.equal(alone, together[own])
    if own_gates is not None and gates is not None:
        assert torch.equal(own_gates.factors[0], gates.factors[at])


def test_a_step_without_gates_finds_none(served: Served) -> None:
    row_slots, starts = rows_of([(0, 3)])
    place, x = served.layout.group(LAYER, "qkv"), normal(95, 3, HIDDEN).bfloat16()
    assert find_gates(served.step(row_slots, starts=starts), place, x, served.workspace(3)) is None
    other = served.layout.group(LAYER, "o")
    step = served.step([1] * 3, starts=[0, 3])
    assert find_gates(step, other, normal(96, 3, other.d_in).bfloat16(), served.workspace(3)) is None


def test_a_wide_input_is_gated_in_parts() -> None:
    wide = 1100
    delta = LowRank(
        Site(LAYER, "down_proj"), normal(1, 3, wide), normal(2, HIDDEN, 3), 0.5, gate(3, size=wide)
    )
    served = Served([[delta]], odd_architecture(width=wide))
    x, y = normal(4, 3, wide).bfloat16(), normal(5, 3, HIDDEN)
    step, place, found = (
        served.step([1, 1, 1], starts=[0, 3]),
        served.layout.group(LAYER, "down"),
        y.clone(),
    )
    work = served.workspace(3)
    find_gates(step, place, x, work)
    deltas.change_outputs(step, place, x, found, work)
    right = outputs_of(served, LAYER, "down", [1, 1, 1], x, y, [0, 3])
    assert off(found - y, right - y) <= 3e-3
