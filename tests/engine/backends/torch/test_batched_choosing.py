"""Tokens chosen and log-probabilities found for all rows at once, against the reference, which takes one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.torch.batched.logits import DeviceLogits
from manyhats.engine.backends.torch.choosing import TorchChooser
from manyhats.engine.backends.wants import NO_WANTS, Outcome, Targets, Wants
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.sampler import SamplingRow
from support.harnesses.backends import DEVICE
from support.harnesses.sampling import V, check_alike, mask_of, sample, sample_from, sampling_rows


def random_logits(seed: int, rows: int, vocab_size: int = V, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def on_device(logits: Tensor) -> DeviceLogits:
    return DeviceLogits(logits.to(DEVICE), torch.empty(0, 0))


def check(logits: Tensor, rows: list[SamplingRow]) -> None:
    found = sample_from(on_device(logits), rows, logits.shape[1])
    check_alike(found, sample(logits.clone(), rows, TorchChooser()))


@settings(max_examples=150)
@given(
    rows=st.lists(sampling_rows(), min_size=1, max_size=6),
    seed=st.integers(0, 9999),
    scale=st.sampled_from([0.01, 0.5, 5.0, 300.0]),
)
def test_rows_together_are_chosen_as_each_by_the_reference(
    rows: list[SamplingRow], seed: int, scale: float
) -> None:
    check(random_logits(seed, len(rows), scale=scale), rows)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
        SamplingParams(temperature=2.0, min_p=0.02, typical_p=0.8),
    ],
)
def test_tokens_of_large_vocabularies_are_the_reference_s(params: SamplingParams) -> None:
    rows = [SamplingRow(params=params, seed=seed, num_logprobs=seed % 4) for seed in range(30)]
    check(random_logits(1, 30, 5003), rows)


def test_of_equal_logits_the_smallest_id_is_chosen_and_ranked_first() -> None:
    logits = torch.tensor([[3.0, 7.0, 7.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    sampled = sample_from(on_device(logits), [SamplingRow(params=SamplingParams(), num_logprobs=3)] * 2, 4)
    assert sampled.token_ids == [1, 0]
    assert [list(each.top_ids) for each in sampled.logprobs if each] == [[1, 2, 0], [0, 1, 2]]


def test_where_no_token_is_allowed_none_is_chosen_and_neighbours_are() -> None:
    none = SamplingRow(params=SamplingParams(temperature=1.0), allowed=mask_of([False] * V), num_logprobs=2)
    greedy = SamplingRow(params=SamplingParams(), allowed=mask_of([False] * V))
    sound = SamplingRow(params=SamplingParams(temperature=1.0), seed=4, num_logprobs=1)
    check(random_logits(3, 3), [none, greedy, sound])


def test_rows_that_are_not_finite_are_named_and_spoil_no_other() -> None:
    logits = random_logits(5, 4)
    spoiled = logits.clone()
    spoiled[1, 3], spoiled[2, 0] = torch.nan, torch.inf
    wants = wants_of(4)
    found, sound = (on_device(each).finish(wants).result() for each in (spoiled, logits))
    assert found.bad_rows == {1, 2}
    for row in (0, 3):
        assert found.targets[row] == sound.targets[row]


def wants_of(num_rows: int, num_top: int = 3) -> Wants:
    rows = np.arange(num_rows)
    targets = Targets(rows=rows, ids=rows * 7 % V, num_top=np.full(num_rows, num_top))
    return Wants(NO_WANTS.choices, targets, np.array([num_rows - 1, 0], np.int32))


def outcomes(logits: Tensor, wants: Wants) -> tuple[Outcome, Outcome]:
    reference = HostLogits(logits.clone(), TorchChooser()).finish(wants).result()
    return on_device(logits).finish(wants).result(), reference


@pytest.mark.parametrize("num_top", [0, 1, V])
def test_targets_and_whole_rows_are_the_reference_s(num_top: int) -> None:
    found, expected = outcomes(random_logits(2, 9), wants_of(9, num_top))
    np.testing.assert_array_equal(found.whole, expected.whole)
    for ours, theirs in zip(found.targets, expected.targets, strict=True):
        assert (ours.rank, ours.top_ids) == (theirs.rank, theirs.top_ids)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-6)
        assert list(ours.top_logprobs) == pytest.approx(list(theirs.top_logprobs), abs=2e-6)
