"""Adapters at the embedding and the output head, against what the torch backend's slots hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters import equations
from manyhats.adapters.primitives import (
    Affine,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    LowRank,
)
from manyhats.adapters.sites import EMBEDDING, HEAD, Site
from manyhats.engine.backends.cuda.adapters import ends
from support.gpu.adapters import Served, normal, odd_architecture, off
from support.gpu.no_sync import no_sync

HIDDEN, VOCAB = 40, 70


def ids(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


EMBEDDINGS: list[list[Delta]] = [
    [EmbeddingLowRank(normal(1, 3, VOCAB).t(), normal(2, HIDDEN, 3), 0.7)],
    [EmbeddingRows(ids(9, 4, 30, 75), normal(3, 4, HIDDEN))],
    [
        EmbeddingLowRank(normal(4, VOCAB, 20), normal(5, HIDDEN, 20), 1.5),
        EmbeddingRows(ids(4), normal(6, 1, HIDDEN)),
    ],
    [Affine(Site(1, "q_proj"), normal(7, 48), None)],
]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 4, 9, 30, 31, 69])), min_size=1, max_size=9))
def test_each_row_has_its_own_adapters_embedding(rows: list[tuple[int, int]]) -> None:
    rows = [*rows, (2, 75)]  # a token that is the task's own
    served, multiplier = Served(EMBEDDINGS), 1.75
    row_slots, tokens = [slot for slot, _ in rows], [token for _, token in rows]
    base = normal(8, VOCAB, HIDDEN)
    embedded = base[ids(*tokens).clamp(max=VOCAB - 1)]
    found = embedded * multiplier
    with no_sync():
        ends.change_embeddings(
            served.step(row_slots, slack=2), served.layout, ids(*tokens).int(), found, multiplier
        )
    for row, (slot, token) in enumerate(rows):
        right = embedded[row : row + 1]
        held = served.torch.get(slot)
        for kind in (EmbeddingLowRank, EmbeddingRows):
            for delta in [] if held is None else held.at(EMBEDDING, kind):
                right = equations.embedding(delta, ids(token), right)
        if slot in (0, 4) or (slot == 2 and token in (4, 9, 30, 75)):
            assert torch.equal(found[row], right[0] * multiplier), "taken as it is"
        assert torch.allclose(found[row], right[0] * multiplier, rtol=1e-5, atol=1e-4)


def test_a_wide_embedding_is_changed_in_parts() -> None:
    wide = 1100
    own: list[Delta] = [
        EmbeddingLowRank(normal(4, VOCAB, 3), normal(5, wide, 3), 1.5),
        EmbeddingRows(ids(4), normal(6, 1, wide)),
    ]
    served = Served([own], odd_architecture(hidden_size=wide))
    embedded, tokens = normal(8, 3, wide), ids(4, 5, 5)
    found = embedded.clone()
    ends.change_embeddings(served.step([1, 1, 0]), served.layout, tokens.int(), found)
    low_rank, rows = served.torch[1].at(EMBEDDING, EmbeddingLowRank | EmbeddingRows)
    right = equations.embedding(rows, tokens, equations.embedding(low_rank, tokens, embedded))
    assert torch.equal(found[0], right[0])
    assert torch.allclose(found[1], right[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(found[2], embedded[2])


HEADS: list[list[Delta]] = [
    [LowRank(HEAD, normal(11, 17, HIDDEN), normal(12, VOCAB, 17), 0.5)],
    [HeadRows(ids(9, 4, 30), normal(13, 3, HIDDEN), normal(14, 3))],
    [HeadWeight(normal(15, VOCAB, HIDDEN), normal(16, VOCAB)), HeadRows(ids(69), normal(17, 1, HIDDEN))],
    [
        HeadWeight(normal(18, VOCAB, HIDDEN)),
        LowRank(HEAD, normal(19, 3, HIDDEN), normal(20, VOCAB, 3), 0.5),
    ],
    [Affine(Site(1, "q_proj"), normal(21, 48), None)],
]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(HEADS)


def expected(served: Served, row_slots: list[int], hidden: Tensor, logits: Tensor) -> Tensor:
    """A weight of its own, then rows, then a low rank; in float64."""
    found = logits.double().clone()
    for row, slot in enumerate(row_slots):
        held, x = served.torch.get(slot), hidden[row].double()
        for weight in [] if held is None else held.at(HEAD, HeadWeight):
            found[row] = weight.weight.double() @ x + (0.0 if weight.bias is None else weight.bias)
        for own in [] if held is None else held.at(HEAD, HeadRows):
            found[row, own.ids] = own.rows.double() @ x + (0.0 if own.bias is None else own.bias)
        for delta in [] if held is None else held.at(HEAD, LowRank):
            found[row] += equations.low_rank(x, delta.a.double(), delta.b.double(), delta.scale)
    return found


def changed(served: Served, row_slots: list[int], hidden: Tensor, logits: Tensor, slack: int = 0) -> Tensor:
    step, found = served.step(row_slots, slack=slack), logits.clone()
    work = served.workspace(step.max_rows)
    with no_sync():
        ends.change_logits(step, served.layout, hidden, found, work)
    return found


MIXED = [1, 4, 0, 2, 3, 5, *[2] * 16, 4]


def inputs(num_rows: int, vocab_size: int = VOCAB) -> tuple[Tensor, Tensor]:
    return normal(30, num_rows, HIDDEN).bfloat16(), normal(31, num_rows, vocab_size)


def test_each_row_has_its_own_adapters_head(served: Served) -> None:
    hidden, logits = inputs(len(MIXED))
    found, right = changed(served, MIXED, hidden, logits), expected(served, MIXED, hidden, logits)
    for row, slot in enumerate(MIXED):
        if slot in (0, 5):
            assert torch.equal(found[row], logits[row])
        assert off(found[row], right[row]) <= (1e-6 if slot in (2, 3) else 3e-3)


def test_a_row_has_the_same_bits_alone_and_in_any_step(served: Served) -> None:
    hidden, logits = inputs(len(MIXED))
    together = changed(served, MIXED, hidden, logits, slack=3)
    for row in (0, 1, 4, 10):
        only = slice(row, row + 1)
        assert torch.equal(changed(served, [MIXED[row]], hidden[only], logits[only]), together[only])


def test_a_task_with_more_tokens_has_logits_of_its_own() -> None:
    more = VOCAB + 5
    served = Served(
        [[HeadRows(ids(3, more - 1), normal(40, 2, HIDDEN))], HEADS[0], [HeadWeight(normal(41, 7, HIDDEN))]],
        vocab_sizes={1: more, 3: 7},
    )
    row_slots = [0, 1, 2, 3, 1]
    shared, apart = served.slots.by_vocabulary(served.rows(row_slots))
    assert (shared.rows.tolist(), shared.slots.tolist(), shared.num_adapters) == ([2], [2], 1)
    assert [(own.rows.tolist(), size) for own, size in apart] == [([1, 4], more), ([3], 7)]
    for own, size in apart:
        hidden, logits = inputs(len(own.rows), size)
        slots = own.slots.tolist()
        found = changed(served, slots, hidden, logits)
        assert off(found, expected(served, slots, hidden, logits)) <= 1e-6


def test_a_vocabulary_is_the_bases_where_the_head_is() -> None:
    served = Served([EMBEDDINGS[1]], vocab_sizes={1: VOCAB + 6})
    shared, apart = served.slots.by_vocabulary(served.rows([1, 0]))
    assert np.array_equal(shared.rows, [0])
    assert apart == []
