import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.backends import choosing as found_logprobs
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.wants import TokenLogprob
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow
from support.harnesses.sampling import sample
from support.oracles.operations import ReferenceKernels

KERNELS = CpuKernels(2)


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, num_top: int) -> list[TokenLogprob]:
    return found_logprobs.token_logprobs(logits, targets.numpy(), num_top, KERNELS)


def random_logits(seed: int, rows: int, vocab_size: int) -> torch.Tensor:
    return 4 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 5), vocab_size=st.sampled_from([1, 7, 300]))
def test_logprobs_ranks_and_top_equal_a_slow_reference(seed: int, rows: int, vocab_size: int) -> None:
    logits = random_logits(seed, rows, vocab_size)
    targets = torch.arange(rows) % vocab_size
    expected = logits.double().log_softmax(dim=1)
    num_top = min(3, vocab_size)
    for i, found in enumerate(token_logprobs(logits, targets, num_top)):
        target = int(targets[i])
        order = sorted(range(vocab_size), key=lambda t: (-float(logits[i, t]), t))
        assert found.logprob == pytest.approx(float(expected[i, target]), abs=1e-5)
        assert found.rank == 1 + int((logits[i] > logits[i, target]).sum())
        assert [token for token, _ in found.top] == order[:num_top]
        assert [value for _, value in found.top] == pytest.approx(
            expected[i, order[:num_top]].tolist(), abs=1e-5
        )


def test_equal_logits_share_a_rank_and_go_by_id_in_top() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    (found,) = token_logprobs(logits, torch.tensor([4]), 2)
    assert (found.rank, [token for token, _ in found.top]) == (1, [1, 2])
    (found,) = token_logprobs(logits, torch.tensor([0]), 0)
    assert (found.rank, found.top) == (4, ())


def test_more_top_tokens_than_the_vocabulary_gives_all() -> None:
    (found,) = token_logprobs(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 10)
    assert [token for token, _ in found.top] == [1, 0]


def test_a_row_has_the_same_numbers_in_any_batch() -> None:
    logits, targets = random_logits(1, 6, 49_152), torch.arange(6)
    together = token_logprobs(logits, targets, 5)
    alone = [token_logprobs(logits[i : i + 1].clone(), targets[i : i + 1], 5)[0] for i in range(6)]
    assert together == alone


def test_large_logits_do_not_overflow() -> None:
    (found,) = token_logprobs(torch.tensor([[1e4, -1e4, 1e4]]), torch.tensor([0]), 1)
    assert found.logprob == pytest.approx(-math.log(2))


def test_sampled_tokens_have_logprobs_of_the_raw_logits() -> None:
    logits = random_logits(2, 3, 50)
    changed = SamplingParams(temperature=2.0, top_k=5, repetition_penalty=3.0, logit_bias={7: 300.0})
    rows = [
        SamplingRow(params=changed, edits=LogitChanges(changed, [], [7]).edits, num_logprobs=2),
        SamplingRow(params=SamplingParams(), num_logprobs=0),
        SamplingRow(params=SamplingParams()),
    ]
    sampled = sample(logits, rows, KERNELS)
    expected = token_logprobs(logits, torch.tensor(sampled.token_ids), 2)
    assert sampled.token_ids[0] == 7
    assert sampled.logprobs[0] == expected[0]
    assert sampled.logprobs[1] is not None
    assert (sampled.logprobs[1].logprob, sampled.logprobs[1].top) == (expected[1].logprob, ())
    assert sampled.logprobs[2] is None


@st.composite
def tied_logits(draw: st.DrawFn) -> torch.Tensor:
    """Rows with few different values, or with many; sorted, or not."""
    rows = draw(st.integers(1, 4))
    size = draw(st.sampled_from([1, 2, 7, 8, 9, 15, 16, 63, 64, 65, 255, 256, 257, 1000]))
    num_values = draw(st.sampled_from([1, 2, 5, 40, 10**6]))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = (generator.integers(0, num_values, size=(rows, size)) - num_values / 2).astype(np.float32)
    values *= np.float32(draw(st.sampled_from([1e-4, 1.0, 30.0, 1e4])))
    order = draw(st.sampled_from(["none", "up", "down"]))
    if order != "none":
        values = np.sort(values, axis=1)[:, :: 1 if order == "up" else -1].copy()
    return torch.from_numpy(values)


@settings(deadline=None)
@given(logits=tied_logits(), num_top=st.sampled_from([0, 1, 2, 5, 20, 100]), data=st.data())
def test_the_kernel_finds_what_the_reference_does(
    logits: torch.Tensor, num_top: int, data: st.DataObject
) -> None:
    pairs = data.draw(
        st.lists(
            st.tuples(st.integers(0, logits.shape[0] - 1), st.integers(0, logits.shape[1] - 1)), max_size=20
        )
    )
    rows, targets = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    num_top = min(num_top, logits.shape[1])
    found = KERNELS.logprobs(logits, rows, targets, num_top)
    expected = ReferenceKernels().logprobs(logits, rows, targets, num_top)
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert found.top_ids.tolist() == expected.top_ids.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_many_tokens_of_one_row_are_found_at_once(seed: int) -> None:
    logits = random_logits(seed, 3, 100 + seed)
    targets = [(7 * i) % logits.shape[1] for i in range(60)]
    rows = [i % 3 for i in range(60)]
    found = found_logprobs.token_logprobs(logits, np.array(targets), 3, KERNELS, rows=np.array(rows))
    expected = logits.double().log_softmax(dim=1)
    for row, target, each in zip(rows, targets, found, strict=True):
        assert each.logprob == pytest.approx(float(expected[row, target]), abs=1e-5)
        assert [token for token, _ in each.top] == logits[row].topk(3).indices.tolist()


@pytest.mark.parametrize("target", [-1, 50, 51, 2**31, 2**63 - 1])
def test_a_token_outside_the_vocabulary_is_an_error(target: int) -> None:
    with pytest.raises(IndexError, match="vocabulary of 50"):
        found_logprobs.token_logprobs(random_logits(1, 2, 50), np.array([3, target]), 0, KERNELS)
    with pytest.raises(ValueError, match="1 tokens for 2 rows"):
        found_logprobs.token_logprobs(random_logits(1, 2, 50), np.array([3]), 0, KERNELS)


def test_numbers_depend_neither_on_threads_nor_on_neighbours() -> None:
    logits, targets = random_logits(1, 6, 4999), np.arange(6)
    whole = found_logprobs.token_logprobs(logits, targets, 100, CpuKernels(2))
    one_thread = found_logprobs.token_logprobs(logits, targets, 100, CpuKernels(1))
    alone = [
        found_logprobs.token_logprobs(logits[i : i + 1], targets[i : i + 1], 100, KERNELS)[0]
        for i in range(6)
    ]
    assert whole == one_thread == alone
