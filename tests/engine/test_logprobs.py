import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.kernels.reference import ReferenceKernels
from manyhats.engine.logprobs import token_logprobs
from manyhats.engine.penalties import LogitChanges
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampler import SamplingRow, sample


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
        SamplingRow(params=changed, changes=LogitChanges(changed, [], [7]), num_logprobs=2),
        SamplingRow(params=SamplingParams(), num_logprobs=0),
        SamplingRow(params=SamplingParams()),
    ]
    sampled = sample(logits, rows, ReferenceKernels())
    expected = token_logprobs(logits, torch.tensor(sampled.token_ids), 2)
    assert sampled.token_ids[0] == 7
    assert sampled.logprobs[0] == expected[0]
    assert sampled.logprobs[1] is not None
    assert (sampled.logprobs[1].logprob, sampled.logprobs[1].top) == (expected[1].logprob, ())
    assert sampled.logprobs[2] is None
