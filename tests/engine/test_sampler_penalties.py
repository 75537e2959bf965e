import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from manyhats.engine.penalties import penalized, restricted
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampler import SamplingRow, sample

V = 12
IDS = st.lists(st.integers(0, V - 1), max_size=10)
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V)


def reference(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """Token by token, in the order that ``SamplingParams`` gives."""
    result = []
    for token, value in enumerate(logits):
        value += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        if token in output:
            value -= params.presence_penalty + params.frequency_penalty * output.count(token)
        result.append(value)
    return result


@given(
    logits=LOGITS,
    prompt=IDS,
    output=IDS,
    repetition=st.floats(0.1, 5),
    presence=st.floats(-5, 5),
    frequency=st.floats(-5, 5),
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-10, 10), max_size=4),
)
def test_penalties_equal_the_reference(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    row = np.array(logits, np.float32)
    found = penalized(row, params, prompt, output)
    expected = reference(logits, params, prompt, output)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert row.tolist() == logits


@given(logits=LOGITS, prompt=IDS.filter(bool), output=IDS, factor=st.floats(0.1, 5))
def test_the_repetition_penalty_equals_transformers(
    logits: list[float], prompt: list[int], output: list[int], factor: float
) -> None:
    row = torch.tensor([logits])
    expected = RepetitionPenaltyLogitsProcessor(factor)(torch.tensor([prompt + output]), row.clone())
    found = penalized(row[0].numpy(), SamplingParams(repetition_penalty=factor), prompt, output)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("value", [1e-300, 100.0])
def test_extreme_penalties_stay_finite(value: float) -> None:
    row = np.array([3e4, -3e4, 0.0], np.float32)
    params = SamplingParams(repetition_penalty=value, temperature=1.0)
    assert np.isfinite(penalized(row, params, [0, 1, 2], [])).all()
    sampling_row = SamplingRow(params=params, prompt_token_ids=[0, 1, 2])
    assert sample(torch.from_numpy(row[None]), [sampling_row]).token_ids == [0]


@pytest.mark.parametrize(
    ("params", "prompt", "output", "token"),
    [
        (SamplingParams(logit_bias={2: 5.0}), [], [], 2),
        (SamplingParams(repetition_penalty=2.0), [0], [], 1),
        (SamplingParams(presence_penalty=2.0), [0], [], 0),
        (SamplingParams(presence_penalty=2.0), [], [0], 1),
        (SamplingParams(frequency_penalty=0.6), [], [0], 0),
        (SamplingParams(frequency_penalty=0.6), [], [0, 0], 1),
    ],
)
def test_bias_and_penalties_apply_to_greedy_rows(
    params: SamplingParams, prompt: list[int], output: list[int], token: int
) -> None:
    row = SamplingRow(params=params, prompt_token_ids=prompt, output_token_ids=output)
    assert sample(torch.tensor([[3.0, 2.0, 1.0]]), [row]).token_ids == [token]


def test_restrictions_are_minus_infinity_and_leave_the_rest() -> None:
    row = np.arange(4, dtype=np.float32)
    assert restricted(row, (3,), None).tolist() == [0.0, 1.0, 2.0, -np.inf]
    allowed = np.array([True, False, True, True])
    assert restricted(row, (3,), allowed).tolist() == [0.0, -np.inf, 2.0, -np.inf]
    assert row.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_id_outside_the_vocabulary_is_an_error() -> None:
    row = SamplingRow(params=SamplingParams(logit_bias={9: 1.0}))
    with pytest.raises(IndexError, match="9"):
        sample(torch.zeros(1, 4), [row])
