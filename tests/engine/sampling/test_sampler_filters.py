"""Each filter against a slow reference in float64, and against transformers'."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from manyhats.engine.backends.cpu.choosing import sampling, selection
from manyhats.engine.backends.cpu.choosing.selection import GROUP, NUM_BUCKETS
from manyhats.engine.backends.torch.choosing import passing
from manyhats.engine.request import SamplingParams
from support.harnesses.kernels import from_python

Floats = npt.NDArray[np.float64]
filter_row, keep_shortest = from_python(sampling.filter_row), from_python(selection.keep_shortest)


def random_row(seed: int, size: int, scale: float = 2.0) -> npt.NDArray[np.float32]:
    row: npt.NDArray[np.float32] = (scale * np.random.default_rng(seed).standard_normal(size)).astype(
        np.float32
    )
    row -= row.max()
    return row


def padded(values: npt.ArrayLike, fill: float) -> npt.NDArray[np.float32]:
    row = np.asarray(values, np.float32)
    return np.concatenate([row, np.full(-row.size % GROUP, fill, np.float32)])


def passed(row: npt.NDArray[np.float32], params: SamplingParams) -> list[int]:
    """The tokens that the kernel lets pass; its weights must be theirs, and the reference must agree."""
    x = padded(row, -np.inf)
    weights = np.exp(x)
    scores, ids, picks = np.full_like(x, np.nan), *(np.full(x.size, -7, np.int32) for _ in range(2))
    limits = (params.top_k, params.top_p, params.min_p, params.typical_p)
    n, is_whole = filter_row(*limits, ids, x, weights, scores, row.size, np.full(NUM_BUCKETS, np.nan), picks)
    found = list(range(row.size)) if is_whole else ids[:n].tolist()
    np.testing.assert_array_equal(weights[:n], np.exp(row[found]))
    assert not weights[n : -(-n // 8) * 8].any()
    assert found == sorted(set(found))
    slow = passing(torch.from_numpy(row.copy()).double(), *limits).tolist()
    assert len(set(found) ^ set(slow)) <= edge(row)
    return found


def edge(row: npt.NDArray[np.float32]) -> int:
    """How many tokens of a row may fall on the other side in float32 than in float64."""
    return 0 if row.size <= 200 else 2


def shortest(probabilities: dict[int, float], order: list[int], mass: float) -> list[int]:
    kept: list[int] = []
    while sum(probabilities[token] for token in kept) < mass and len(kept) < len(order):
        kept.append(order[len(kept)])
    return sorted(kept)


def renormalized(row: npt.NDArray[np.float32], tokens: list[int]) -> dict[int, float]:
    weights = np.exp(row[tokens].astype(np.float64))
    return dict(zip(tokens, (weights / weights.sum()).tolist(), strict=True))


def reference(row: npt.NDArray[np.float32], params: SamplingParams) -> list[int]:
    """One filter after another, each over the renormalized distribution that is left."""
    tokens = list(range(row.size))
    if params.top_k and params.top_k < row.size:
        kth = sorted(row.tolist(), reverse=True)[params.top_k - 1]
        tokens = [token for token in tokens if row[token] >= kth]
    p = renormalized(row, tokens)
    if params.top_p < 1:
        tokens = shortest(p, sorted(tokens, key=lambda t: (-p[t], t)), params.top_p)
        p = renormalized(row, tokens)
    largest = max(p.values())
    tokens = [token for token in tokens if p[token] >= params.min_p * largest]
    p = renormalized(row, tokens)
    if params.typical_p < 1:
        entropy = -sum(q * np.log(q) for q in p.values())
        by_surprise = sorted(tokens, key=lambda t: (abs(-np.log(p[t]) - entropy), t))
        tokens = shortest(p, by_surprise, params.typical_p)
    return tokens


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 2, 17, 200]),
    top_k=st.sampled_from([0, 1, 5, 50, 500]),
    top_p=st.sampled_from([1.0, 0.013, 0.517, 0.913]),
    min_p=st.sampled_from([0.0, 0.017, 0.313, 1.0]),
    typical_p=st.sampled_from([1.0, 0.213, 0.717, 0.957]),
)
def test_filters_one_after_another_equal_the_reference(
    seed: int, size: int, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    row = random_row(seed, size)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    assert passed(row, params) == reference(row, params)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 30.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=700),
        SamplingParams(top_p=0.913),
        SamplingParams(min_p=0.0317),
        SamplingParams(typical_p=0.871),
        SamplingParams(top_k=3000, top_p=0.83, min_p=0.011, typical_p=0.77),
    ],
)
def test_filters_of_a_large_vocabulary_equal_the_reference(scale: float, params: SamplingParams) -> None:
    row = random_row(11, 5000, scale)
    found, expected = set(passed(row, params)), set(reference(row, params))
    assert len(found ^ expected) <= edge(row)


def test_no_filter_passes_all() -> None:
    for params in (SamplingParams(), SamplingParams(top_k=9), SamplingParams(top_k=10)):
        assert passed(random_row(0, 9), params) == list(range(9))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(typical_p=1e-9),
        SamplingParams(top_k=1, top_p=1e-9, min_p=1.0, typical_p=1e-9),
    ],
)
def test_at_least_one_token_passes(params: SamplingParams) -> None:
    assert len(passed(random_row(2, 30), params)) == 1


def test_ties_at_the_edge_stay_in_top_k_and_go_by_id_in_top_p() -> None:
    row = np.array([-1.0, 0.0, -1.0, -1.0], np.float32)
    assert passed(row, SamplingParams(top_k=2)) == [0, 1, 2, 3]
    assert passed(row, SamplingParams(top_p=0.6)) == [0, 1]
    equal = np.zeros(4, np.float32)
    assert passed(equal, SamplingParams(top_p=0.5)) == [0, 1]
    assert passed(equal, SamplingParams(typical_p=0.5)) == [0, 1]


@pytest.mark.parametrize(
    "params", [SamplingParams(top_p=0.9999999), SamplingParams(typical_p=0.9), SamplingParams(min_p=1e-9)]
)
def test_forbidden_tokens_do_not_pass(params: SamplingParams) -> None:
    row = np.array([0.0, -np.inf, -1.0, -np.inf], np.float32)
    assert set(passed(row, params)) <= {0, 2}


@settings(deadline=None)
@given(
    keys=st.lists(st.sampled_from([0.0, 1.0, 3.5, 4.5, 9.0, 200.0]), min_size=1, max_size=12),
    mass=st.sampled_from([0.05, 0.45, 0.55, 0.95]),
    data=st.data(),
)
def test_the_smallest_set_is_shortest_in_order_of_key_and_index(
    keys: list[float], mass: float, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(0, 7), min_size=len(keys), max_size=len(keys)).filter(any))
    total = sum(counts)
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    kept: list[int] = []
    while sum(counts[i] for i in kept) < mass * total:
        kept.append(order[len(kept)])
    scores, weights = padded([-key for key in keys], -np.inf), padded(counts, 0)
    ids, picks = np.empty(scores.size, np.int32), np.empty(scores.size, np.int32)
    buckets = np.empty(NUM_BUCKETS)
    n = keep_shortest(
        mass, scores.max(), ids, scores.copy(), weights, scores, len(keys), True, buckets, picks
    )
    # What weighs nothing may stay or go; nobody draws it.
    assert [i for i in ids[:n].tolist() if counts[i]] == sorted(i for i in kept if counts[i])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [50, 3000])
@pytest.mark.parametrize(
    ("params", "warper"),
    [
        (SamplingParams(top_k=20), TopKLogitsWarper(20)),
        (SamplingParams(top_p=0.87), TopPLogitsWarper(0.87)),
        (SamplingParams(min_p=0.03), MinPLogitsWarper(0.03)),
        (SamplingParams(typical_p=0.83), TypicalLogitsWarper(0.83)),
    ],
)
def test_each_filter_equals_transformers(
    params: SamplingParams, warper: LogitsProcessor, size: int, seed: int
) -> None:
    row = random_row(seed, size)
    scores = warper(torch.zeros(1, 1).long(), torch.from_numpy(row[None].copy()))
    assert passed(row, params) == torch.isfinite(scores[0]).nonzero().flatten().tolist()
