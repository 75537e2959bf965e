import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.logits import non_finite_rows
from manyhats.engine.errors import NoTokenAllowedError
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow, choices_of, uniform
from support.harnesses import sampling
from support.harnesses.sampling import Sampled, V, check_alike, mask_of, sampling_rows
from support.oracles.operations import ReferenceKernels

KERNELS = CpuKernels(2)


def random_logits(seed: int, rows: int = 1, vocab_size: int = V, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    return sampling.sample(logits, rows, KERNELS)


def one(logits: Tensor, row: SamplingRow) -> int:
    return sample(logits.reshape(1, -1), [row]).token_ids[0]


def test_greedy_takes_the_largest_and_the_smallest_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [-1.0, 0.5, 0.5]])
    row = SamplingRow(params=SamplingParams())
    assert sample(logits, [row] * 3).token_ids == [1, 0, 1]
    # The same where another row keeps the batch off the fast path.
    mixed = [row, row, SamplingRow(params=SamplingParams(temperature=1.0, top_k=1))]
    assert sample(logits, mixed).token_ids[:2] == [1, 0]


def test_an_empty_batch_gives_nothing() -> None:
    assert sample(torch.empty(0, V), []).token_ids == []


@settings(deadline=None)
@given(rows=st.lists(sampling_rows(), min_size=1, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_a_row_comes_out_alike_alone_and_in_any_batch(
    rows: list[SamplingRow], seed: int, data: st.DataObject
) -> None:
    logits = random_logits(seed, len(rows))
    batch = sample(logits, rows)
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], [row])
        assert (alone.token_ids[0], alone.logprobs[0]) == (batch.token_ids[i], batch.logprobs[i])
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids == [batch.token_ids[i] for i in order]


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(sampling_rows(), min_size=1, max_size=6),
    seed=st.integers(0, 9999),
    scale=st.sampled_from([0.01, 0.5, 5.0, 300.0]),
)
def test_the_kernel_chooses_what_the_reference_chooses(
    rows: list[SamplingRow], seed: int, scale: float
) -> None:
    logits = random_logits(seed, len(rows), scale=scale)
    check_alike(sample(logits, rows), sampling.sample(logits, rows, ReferenceKernels()))


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("vocab_size", [63, 64, 65, 5003])
def test_the_kernel_chooses_what_the_reference_chooses_from_many(vocab_size: int, scale: float) -> None:
    logits = random_logits(vocab_size, 40, vocab_size, scale)
    filters = [
        {},
        {"top_k": 30},
        {"top_k": 400},
        {"top_p": 0.913},
        {"min_p": 0.0317},
        {"typical_p": 0.871},
        {"typical_p": 0.213},
        {"top_k": 60, "top_p": 0.83, "min_p": 0.011, "typical_p": 0.77},
    ]
    rows = [
        SamplingRow(params=SamplingParams(temperature=0.8, **filters[i % 8]), seed=i)  # type: ignore[arg-type]
        for i in range(40)
    ]
    check_alike(sample(logits, rows), sampling.sample(logits, rows, ReferenceKernels()))


def test_a_row_of_a_large_vocabulary_comes_out_alike_in_any_batch() -> None:
    logits = random_logits(3, 8, 49_152)
    params = [{}, {"top_p": 0.9}, {"typical_p": 0.8}, {"top_k": 500, "top_p": 0.7}, {"min_p": 0.1}]
    rows = [
        SamplingRow(params=SamplingParams(temperature=1.3, **params[i % 5]), seed=i, num_logprobs=3)  # type: ignore[arg-type]
        for i in range(8)
    ]
    batch = sample(logits, rows)
    for i in range(8):
        alone = sample(logits[i : i + 1].clone(), rows[i : i + 1])
        assert (alone.token_ids, alone.logprobs) == ([batch.token_ids[i]], [batch.logprobs[i]])
    strided = torch.stack([logits, logits], dim=2).flatten(1)[:, ::2]
    assert sample(strided, rows) == batch


@settings(deadline=None)
@given(row=sampling_rows(), seed=st.integers(0, 99))
def test_the_logits_are_left_alone_and_the_choice_is_repeatable(row: SamplingRow, seed: int) -> None:
    logits = random_logits(seed)
    before = logits.clone()
    first = sample(logits, [row])
    assert torch.equal(logits, before)
    assert sample(logits, [row]) == first


@settings(deadline=None)
@given(row=sampling_rows(), seed=st.integers(0, 99))
def test_forbidden_and_not_allowed_tokens_never_come(row: SamplingRow, seed: int) -> None:
    token = one(random_logits(seed), row)
    assert token not in row.forbid
    assert row.allowed is None or bool(row.allowed[token // 32] >> token % 32 & 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_allows_nothing_fails_and_no_other(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    row = SamplingRow(params=params, allowed=mask_of([False] * V))
    other = SamplingRow(params=SamplingParams(temperature=1.0), seed=7)
    sampled = sample(random_logits(0, 3), [other, row, other])
    assert list(sampled.failures) == [1]
    assert isinstance(sampled.failures[1], NoTokenAllowedError)
    without = sample(random_logits(0, 3)[[0, 2]], [other, other])
    assert sampled.token_ids == [without.token_ids[0], -1, without.token_ids[1]]


BROKEN_ROWS = {
    **{
        f"forbids {token_id}": SamplingRow(params=SamplingParams(), forbid=(token_id,))
        for token_id in (V, V + 1, -1, -V, 2**31, 2**32 - 1, 2**63, -(2**63) - 1)
    },
    **{
        f"biases {token_id}": SamplingRow(params=params, edits=LogitChanges(params).edits)
        for token_id in (V, -1, 2**31, 2**62)
        for params in [SamplingParams(logit_bias={token_id: 1.0})]
    },
    "mask too short": SamplingRow(params=SamplingParams(), allowed=mask_of([True] * 32)),
    "mask too long": SamplingRow(params=SamplingParams(), allowed=mask_of([True] * 65)),
    "empty mask": SamplingRow(params=SamplingParams(), allowed=mask_of([])),
    "forbids all": SamplingRow(params=SamplingParams(), forbid=tuple(range(V))),
    "forbids all, sampled": SamplingRow(params=SamplingParams(temperature=1.0), forbid=tuple(range(V))),
    "forbids what the mask leaves": SamplingRow(
        params=SamplingParams(), forbid=(3,), allowed=mask_of([token == 3 for token in range(V)])
    ),
}


@pytest.mark.parametrize("broken", BROKEN_ROWS.values(), ids=BROKEN_ROWS)
@settings(deadline=None, max_examples=10)
@given(data=st.data(), seed=st.integers(0, 99))
def test_whatever_a_row_fails_with_its_neighbours_are_chosen_as_without_it(
    broken: SamplingRow, data: st.DataObject, seed: int
) -> None:
    rows = data.draw(st.lists(sampling_rows(), max_size=5))
    place = data.draw(st.integers(0, len(rows)))
    logits = random_logits(seed, len(rows) + 1)
    sampled = sample(logits, [*rows[:place], broken, *rows[place:]])
    assert list(sampled.failures) == [place]
    assert sampled.token_ids[place] == -1
    alone = sample(logits[[i for i in range(len(rows) + 1) if i != place]], rows)
    kept = [i for i in range(len(rows) + 1) if i != place]
    assert [sampled.token_ids[i] for i in kept] == alone.token_ids
    assert [sampled.logprobs[i] for i in kept] == alone.logprobs


def expected_distribution(logits: Tensor, params: SamplingParams) -> np.ndarray:
    p = np.exp(logits.double().numpy() / params.temperature)
    return np.asarray(p / p.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_over_many_seeds_follow_the_distribution(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    logits = random_logits(5, vocab_size=12, scale=1.0)[0]
    draws = 8000
    rows = [SamplingRow(params=params, seed=seed, step=seed % 3) for seed in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), rows).token_ids)
    observed = [counts[i] for i in range(12)]
    assert stats.chisquare(observed, draws * expected_distribution(logits, params)).pvalue > 0.01


def test_draws_over_the_steps_of_one_seed_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.0)
    logits = random_logits(6, vocab_size=300, scale=0.5)[0]
    draws = 12_000
    rows = [SamplingRow(params=params, seed=1234, step=step) for step in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), rows).token_ids)
    observed = [counts[i] for i in range(300)]
    assert stats.chisquare(observed, draws * expected_distribution(logits, params)).pvalue > 0.01


@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**31))
def test_random_numbers_lie_in_the_unit_interval(seed: int, step: int) -> None:
    assert 0.0 <= uniform(seed, step) < 1.0


@pytest.mark.parametrize("stride", [1, 2**32])
def test_random_numbers_of_neighbouring_seeds_and_steps_are_uniform_and_unrelated(stride: int) -> None:
    grid = np.array([[uniform(seed * stride, step) for step in range(64)] for seed in range(64)])
    assert stats.kstest(grid.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(grid[0], "uniform").pvalue > 0.01
    assert stats.kstest(grid[:, 0], "uniform").pvalue > 0.01
    limit = 4 / math.sqrt(grid[1:].size)
    assert abs(np.corrcoef(grid[1:].ravel(), grid[:-1].ravel())[0, 1]) < limit
    assert abs(np.corrcoef(grid[:, 1:].ravel(), grid[:, :-1].ravel())[0, 1]) < limit
    assert len(np.unique(grid)) == grid.size


def test_a_token_is_the_first_whose_cumulative_probability_passes_the_number() -> None:
    logits = random_logits(7, vocab_size=1000)[0]
    held = np.cumsum(expected_distribution(logits, SamplingParams(temperature=1.0)))
    for seed in range(200):
        token = one(logits, SamplingRow(params=SamplingParams(temperature=1.0), seed=seed))
        point = uniform(seed, 0)
        assert held[token] > point - 1e-6
        assert token == 0 or held[token - 1] <= point + 1e-6


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
def test_a_tiny_temperature_is_greedy_among_equals(temperature: float) -> None:
    logits = torch.tensor([1.0, 5.0, -1e4, 5.0, 4.999])
    tokens = {
        one(logits, SamplingRow(params=SamplingParams(temperature=temperature), seed=s)) for s in range(40)
    }
    assert tokens == {1, 3}


def test_a_number_next_to_1_draws_the_last_token_that_has_a_weight() -> None:
    logits = torch.full((1, 1000), -1e4)
    logits[0, :400] = torch.linspace(-1, 1, 400)
    row = SamplingRow(params=SamplingParams(temperature=1.0))
    choices = choices_of([row], [0], 1000)
    choices.point.fill(math.nextafter(1.0, 0.0))
    assert KERNELS.choose(logits, choices).tolist() == [399]
    choices.point.fill(0.0)
    assert KERNELS.choose(logits, choices).tolist() == [0]


def test_weights_of_zero_are_never_drawn() -> None:
    logits = torch.full((5000,), -1e4)
    logits[4000] = 0.0
    row = SamplingRow(params=SamplingParams(temperature=1.0, top_p=0.999999, typical_p=0.999999))
    assert one(logits, row) == 4000


def test_the_numbers_of_a_seed_stay_what_they_were() -> None:
    """A client that repeats a request with its seed gets its answer again, from a later version too."""
    rows = [
        SamplingRow(params=SamplingParams(temperature=1.0, top_p=0.9), seed=seed, step=step)
        for seed in (0, 1, 2**63)
        for step in (0, 7)
    ]
    logits = torch.linspace(0, 4, 997)[torch.arange(6 * 997).remainder(991).reshape(6, 997)]
    assert sample(logits, rows).token_ids == [899, 723, 775, 700, 832, 643]


def test_non_finite_rows_are_named_and_large_finite_ones_are_not() -> None:
    logits = random_logits(1, 7, 5000)
    logits[1, 3] = math.nan
    logits[2, 0] = math.inf
    logits[3, 4999] = -math.inf
    logits[4, :2] = torch.tensor([math.inf, -math.inf])
    logits[5] = 3e38
    assert non_finite_rows(logits) == [1, 2, 3, 4]
    assert non_finite_rows(logits[:1]) == []
