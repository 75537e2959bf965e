"""Texts of a step: where their rows are, and bottlenecks at their ends and elsewhere on an encoder's stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.adapters.primitives import Bottleneck, BottleneckInput, TextEnds
from manyhats.adapters.sites import Site
from manyhats.engine.backends.cuda.adapters import bottlenecks
from manyhats.engine.backends.cuda.adapters.texts import arrays_of_texts
from manyhats.engine.backends.plan import AdapterRows
from manyhats.engine.model.architecture import COUPLINGS, Architecture, Norm
from support.gpu.adapters import Served, normal, odd_architecture, off, sublayer_of
from support.gpu.no_sync import no_sync

HIDDEN, EMBEDDED = 40, 24


@given(texts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6))
def test_every_row_is_found_in_its_text(texts: list[tuple[int, int]]) -> None:
    sizes = np.array([size for _, size in texts])
    starts, row_slots = np.append(0, sizes.cumsum()), np.repeat([slot for slot, _ in texts], sizes)
    rows = AdapterRows.of(row_slots.astype(np.int32))
    found = arrays_of_texts(starts.astype(np.int32), rows)
    items, within = found["items"], found["within"]
    for (slot, first, size), (own, _), start in zip(items.tolist(), texts, starts.tolist(), strict=False):
        assert slot == own
        if slot == 0:
            assert first == -1
            continue
        assert rows.rows[first : first + size].tolist() == list(range(start, start + size))
        assert within[first : first + size].tolist() == [[row, size] for row in range(size)]


def encoder() -> Architecture:
    """It sees all of a text, and norms its embeddings, which are narrower than its layers."""
    plain = odd_architecture(hidden_size=HIDDEN)
    blocks = tuple(
        replace(block, attention=replace(block.attention, sees_all=True)) for block in plain.blocks
    )
    embedding = replace(plain.embedding, size=EMBEDDED, norm=Norm(1e-5, kind="layer", has_bias=True))
    return replace(plain, blocks=blocks, embedding=embedding, head=None)


def bottleneck(site: Site, seed: int, size: int, width: int = HIDDEN, **settings: object) -> Bottleneck:
    plain = Bottleneck(
        site,
        BottleneckInput.OUTPUT,
        normal(seed, size, width),
        normal(seed + 1, size),
        normal(seed + 2, width, size),
        normal(seed + 3, width),
        "silu",
        torch.ones(1, device=DEVICE),
    )
    return replace(plain, **settings)  # type: ignore[arg-type]


OUTPUT = Site(1, "output")
ENDS = [
    TextEnds(2, 1, is_split=True),
    TextEnds(1, 0, is_split=False),
    TextEnds(0, 2, is_split=True),
    TextEnds(3, 3, is_split=False),
]
TEXTS = [(1, 4), (0, 2), (2, 3), (3, 1), (1, 1), (4, 20), (3, 5), (5, 2)]
ROW_SLOTS = [slot for slot, size in TEXTS for _ in range(size)]
STARTS = [sum(size for _, size in TEXTS[:text]) for text in range(len(TEXTS) + 1)]


def test_the_ends_of_a_text_pass_through_their_part_of_a_bottleneck() -> None:
    """One adapter of each kind of ends, of odd sizes, and one that all rows pass through, which rescales m as well."""
    own = [
        [bottleneck(OUTPUT, 10 * seed, 5 + 16 * seed, ends=ends, keep=0.5)] for seed, ends in enumerate(ENDS)
    ]
    served = Served(
        [*own[:3], [bottleneck(OUTPUT, 70, 7, ends=ENDS[3])], [bottleneck(OUTPUT, 80, 3)]], encoder()
    )
    stream = normal(90, len(ROW_SLOTS), HIDDEN)
    found = stream.clone()
    step, place = served.step(ROW_SLOTS, slack=3, starts=STARTS), served.layout.place(OUTPUT)
    with no_sync():
        bottlenecks.change_stream(step, place, found, served.workspace(step.max_rows))
    right = sublayer_of(served, OUTPUT, ROW_SLOTS, stream, stream, starts=STARTS)
    changed = (right != stream).any(1)
    assert 0 < changed.sum() < len(ROW_SLOTS)
    assert torch.equal(found[~changed], stream[~changed])
    for slot in range(1, 6):
        own_rows = changed & (torch.tensor(ROW_SLOTS, device=DEVICE) == slot)
        difference = right[own_rows] - stream[own_rows]
        assert off(found[own_rows] - stream[own_rows], difference) <= 5e-3, slot


def test_only_rows_that_pass_through_a_bottleneck_skip_the_norm() -> None:
    site = Site(0, "attention")
    served = Served([[bottleneck(site, 1, 4, ends=TextEnds(1, 1, is_split=False), skips_norm=True)]])
    r, m, normed = (normal(seed, 6, HIDDEN) for seed in (5, 6, 7))
    found = normed.clone()
    step = served.step([1, 1, 1, 1, 0, 0], starts=[0, 4, 6])
    with no_sync():
        bottlenecks.skip_norms(step, served.layout.place(site), r, m, found)
    passes = torch.tensor([True, False, False, True, False, False], device=DEVICE)
    assert torch.equal(found, torch.where(passes[:, None], r + m, normed))


@pytest.mark.parametrize("name", COUPLINGS)
def test_bottlenecks_on_the_embeddings_have_their_width(name: str) -> None:
    site = Site(-1, name)
    served = Served([[bottleneck(site, 1, 6, EMBEDDED)], [bottleneck(Site(0, "output"), 5, 9)]], encoder())
    row_slots = [1, 0, 2, 1]
    x = normal(9, len(row_slots), EMBEDDED)
    found = x.clone()
    with no_sync():
        bottlenecks.change_stream(
            served.step(row_slots), served.layout.place(site), found, served.workspace(4)
        )
    right = sublayer_of(served, site, row_slots, x, x)
    for row, slot in enumerate(row_slots):
        if slot == 1:
            assert off(found[row] - x[row], right[row] - x[row]) <= 5e-3
        else:
            assert torch.equal(found[row], x[row])


def test_a_text_has_the_same_bits_alone_and_in_any_step() -> None:
    served = Served([[bottleneck(OUTPUT, seed, 6, ends=ends)] for seed, ends in enumerate(ENDS)], encoder())
    texts = [(2, 3), (1, 5), (4, 18), (1, 2), (3, 3)]
    sizes = [size for _, size in texts]
    starts = [sum(sizes[:text]) for text in range(len(texts) + 1)]
    stream = normal(90, starts[-1], HIDDEN)

    def changed(row_slots: list[int], first: list[int], x: Tensor) -> Tensor:
        step, found = served.step(row_slots, starts=first), x.clone()
        place, work = served.layout.place(OUTPUT), served.workspace(step.max_rows)
        bottlenecks.change_stream(step, place, found, work)
        return found

    together = changed([slot for slot, size in texts for _ in range(size)], starts, stream)
    for text, (slot, size) in enumerate(texts):
        own = slice(starts[text], starts[text + 1])
        assert torch.equal(changed([slot] * size, [0, size], stream[own]), together[own])
