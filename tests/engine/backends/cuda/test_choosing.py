"""Tokens chosen by CUDA's kernels are those of the torch backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip  kernels are imported after it
from manyhats.engine.backends.cuda.choosing.choose import Choosing, Tiles
from manyhats.engine.backends.wants import Outcome
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import NO_EDITS, Edits, LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow
from support.gpu.choosing import check_chosen, chosen, finish, wants_of
from support.gpu.compiling import faults_of
from support.harnesses.sampling import mask_of

SMALL = Tiles(part=128, edits=4, tile=64, listed=128, num_warps=1)
"""Several parts and tiles in a small vocabulary; lists of one or two tiles."""
UNLISTED = Tiles(part=128, edits=4, tile=128, listed=1, num_warps=1)
"""Rows are looked at whole."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to holds NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_logits(seed: int, rows: int, vocab_size: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[SamplingRow], Tiles]:
    size = draw(st.sampled_from([5, 33, 128, 190, 300]))
    ids = st.integers(0, size - 1)

    def params() -> SamplingParams:
        return SamplingParams(
            temperature=draw(st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0])),
            top_k=draw(st.sampled_from([0, 0, 1, 3, 20, 1000])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.05, 0.517, 0.913])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.0517, 0.513, 1.0])),
            typical_p=draw(st.sampled_from([1.0, 1.0, 0.0513, 0.517, 0.913])),
            repetition_penalty=draw(st.sampled_from([1.0, 0.7, 1.3])),
            presence_penalty=draw(st.sampled_from([0.0, -1.0, 0.5])),
            frequency_penalty=draw(st.sampled_from([0.0, -1.0, 0.5])),
            logit_bias=draw(st.dictionaries(ids, st.floats(-5, 5, width=32), max_size=3)),
        )

    def row() -> SamplingRow:
        own = params()
        prompt, output = draw(st.lists(ids, max_size=5)), draw(st.lists(ids, max_size=9))
        seed = draw(st.none() | st.integers(0, 99))
        allowed = None if seed is None else np.random.default_rng(seed).random(size) < 0.7
        return SamplingRow(
            params=own,
            seed=draw(st.integers(0, 2**64 - 1)),
            edits=draw(st.sampled_from([NO_EDITS, LogitChanges(own, prompt, output).edits])),
            forbid=tuple(draw(st.lists(ids, max_size=2))),
            allowed=None if allowed is None else mask_of(allowed.tolist()),
        )

    rows = [row() for _ in range(draw(st.integers(1, 3)))]
    scale = draw(st.sampled_from([0.01, 1.0, 5.0, 300.0]))
    logits = random_logits(draw(st.integers(0, 99)), len(rows), size, scale)
    if draw(st.booleans()):
        logits = logits.round()  # many are equal
    return logits, rows, draw(st.sampled_from([SMALL, UNLISTED]))


@settings(deadline=None, max_examples=12)
@given(case=cases())
def test_the_kernels_choose_what_the_torch_backend_chooses(
    case: tuple[Tensor, list[SamplingRow], Tiles],
) -> None:
    logits, rows, tiles = case
    wants = wants_of(rows, logits.shape[1])
    tokens = [token.id for token in finish(logits, wants, tiles).tokens]
    check_chosen(logits, wants.choices, tokens)


FILTERS = [
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.1, top_k=50),
    SamplingParams(temperature=0.8, top_p=0.913),
    SamplingParams(temperature=0.8, min_p=0.0317),
    SamplingParams(temperature=0.8, typical_p=0.871),
    SamplingParams(temperature=0.8, top_k=60, top_p=0.83, min_p=0.011, typical_p=0.77),
]


def test_the_kernels_choose_from_a_large_vocabulary_what_the_torch_backend_does() -> None:
    """Few tokens pass where the scale is large, more than a list holds where it is small."""
    params = [*FILTERS, *FILTERS[2:5]]
    logits = random_logits(3, len(params), 49_152)
    logits[: len(FILTERS)] *= 2
    logits[len(FILTERS) :] /= 2
    wants = wants_of([SamplingRow(params=each, seed=7) for each in params], 49_152)
    tokens = [token.id for token in finish(logits, wants, Tiles(part=16384, tile=65536)).tokens]
    check_chosen(logits, wants.choices, tokens)


def test_greedy_takes_the_smallest_id_of_equals() -> None:
    logits = torch.zeros(3, 300)
    logits[1, [140, 150, 299]] = 2.0
    logits[2] = -5.0
    assert chosen(logits, [SamplingRow(params=SamplingParams())] * 3, SMALL) == [0, 140, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_chosen_where_none_may_come(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    rows = [
        SamplingRow(params=params, allowed=mask_of([False] * 5)),
        SamplingRow(params=params, forbid=(0, 1, 2, 3, 4)),
        SamplingRow(params=params, allowed=mask_of([False, True, True, False, False]), forbid=(1,)),
    ]
    assert chosen(random_logits(0, 3, 5), rows, SMALL) == [-1, -1, 2]


def test_masks_say_of_each_token_whether_it_may_come() -> None:
    size = 300
    rows = [
        SamplingRow(params=SamplingParams(), allowed=mask_of([i == only for i in range(size)]))
        for only in (0, 31, 32, 63, 127, 128, 299)
    ]
    assert chosen(random_logits(1, 7, size), rows, SMALL) == [0, 31, 32, 63, 127, 128, 299]


@pytest.mark.parametrize("between", [0, 5])
def test_of_two_edits_for_a_token_the_later_counts(between: int) -> None:
    """Whether or not both are looked at at once."""
    others = [200 + i for i in range(between)]
    ids = np.array([7, 130, *others, 130, 7], np.int64)
    bias = np.array([9.0, 1.0, *([0.0] * between), 5.0, 2.0], np.float32)
    edits = Edits(ids, bias, np.zeros(ids.size, np.bool_), np.zeros(ids.size))
    assert chosen(torch.zeros(1, 300), [SamplingRow(params=SamplingParams(), edits=edits)], SMALL) == [130]


def test_a_tie_at_the_edge_stays_in_top_k_and_goes_by_id_in_top_p() -> None:
    logits = torch.tensor([[-1.0, 0.0, -1.0, -1.0]])
    last = 0.999_999  # the last of those that pass
    for params, expected in (
        (SamplingParams(temperature=1.0, top_k=2), 3),
        (SamplingParams(temperature=1.0, top_p=0.6), 1),
        (SamplingParams(temperature=1.0, top_p=0.5), 1),
    ):
        assert choose_at(logits, params, last).tokens[0].id == expected
    equal = torch.zeros(1, 4)
    for params in (
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=1.0, typical_p=0.5),
    ):
        assert choose_at(equal, params, last).tokens[0].id == 1


def choose_at(logits: Tensor, params: SamplingParams, point: float) -> Outcome:
    wants = wants_of([SamplingRow(params=params)], logits.shape[1])
    wants.choices.point[:] = point
    return finish(logits, wants, SMALL)


@pytest.mark.parametrize("point", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("params", [FILTERS[0], FILTERS[5]])
def test_the_ends_of_the_unit_interval_choose_a_token_that_may_come(
    params: SamplingParams, point: float
) -> None:
    logits = torch.full((1, 300), -1e4)
    logits[0, [3, 140]] = 5.0
    assert choose_at(logits, params, point).tokens[0].id == (3 if point == 0.0 else 140)


def test_a_row_chooses_alike_alone_in_a_batch_and_in_other_tiles() -> None:
    logits = random_logits(5, len(FILTERS), 200)
    rows = [SamplingRow(params=params, seed=3) for params in FILTERS]
    together = chosen(logits, rows, SMALL)
    assert chosen(logits[5:], rows[5:], SMALL) == together[5:]
    assert chosen(logits, rows, Tiles(part=256, edits=4, tile=256, listed=1, num_warps=1)) == together


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1048576"):
        Choosing(torch.device(DEVICE), 1, 1, 1_048_577)


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    rows = [SamplingRow(params=SamplingParams())]
    with pytest.raises(ValueError, match="10 rows and 1 choices, of 9 and 9"):
        chosen(torch.zeros(10, 5), rows, SMALL)


def test_choosing_compiles() -> None:
    assert faults_of("support.gpu.entries.choosing") == []
