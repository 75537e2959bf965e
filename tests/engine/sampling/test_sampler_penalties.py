from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from manyhats.engine.backends.cpu.choosing.choosing import edited
from manyhats.engine.backends.torch.choosing import edited as slowly_edited
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow, choices_of
from support.harnesses.sampling import sample
from support.oracles.operations import ReferenceKernels

V = 12
IDS = st.lists(st.integers(0, V - 1), max_size=10)
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V)


def penalized(
    row: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    """The whole row, with the output taken in token by token, as a request goes on."""
    changes = LogitChanges(params, prompt)
    for token in output:
        changes.append(token)
    choices, *others = (
        choices_of([SamplingRow(params=params, edits=each)], [0], row.size)
        for each in (
            changes.edits,
            LogitChanges(params, prompt, output).edits,
            LogitChanges(params, prompt, output[:2]).edits_after(output[2:]),
        )
    )
    ids, values = choices.edit_ids, edited(row[None], choices)
    for other in others:
        np.testing.assert_array_equal(ids, other.edit_ids)
        np.testing.assert_array_equal(values, edited(row[None], other))
    slowly = [slowly_edited(torch.from_numpy(row), choices, 0, edit) for edit in range(ids.size)]
    np.testing.assert_array_equal(values, np.array(slowly, np.float32))
    assert len(set(ids.tolist())) == ids.size
    result = row.copy()
    result[ids] = values
    return result


def chosen(logits: torch.Tensor, row: SamplingRow) -> int:
    return sample(logits, [row], ReferenceKernels()).token_ids[0]


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
    sampling_row = SamplingRow(params=params, edits=LogitChanges(params, [0, 1, 2]).edits)
    assert chosen(torch.from_numpy(row[None]), sampling_row) == 0


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
    row = SamplingRow(params=params, edits=LogitChanges(params, prompt, output).edits)
    assert chosen(torch.tensor([[3.0, 2.0, 1.0]]), row) == token


def test_many_tokens_are_all_remembered() -> None:
    """More than any first allocation holds."""
    bias = dict.fromkeys(range(0, 1000, 7), 0.5)
    params = SamplingParams(logit_bias=bias, repetition_penalty=2.0, presence_penalty=0.25)
    row = np.linspace(-3, 3, 1000, dtype=np.float32)
    prompt, output = list(range(0, 1000, 3)), list(range(0, 1000, 5))
    found = penalized(row, params, prompt, output)
    np.testing.assert_allclose(found, reference(row.tolist(), params, prompt, output), rtol=1e-5, atol=1e-5)


def test_a_forbidden_token_does_not_come_even_with_a_bias() -> None:
    params = SamplingParams(logit_bias={0: 100.0})
    row = SamplingRow(params=params, edits=LogitChanges(params).edits, forbid=(0,))
    assert chosen(torch.tensor([[3.0, 2.0, 1.0]]), row) == 1


def test_an_id_outside_the_vocabulary_is_an_error() -> None:
    params = SamplingParams(logit_bias={9: 1.0})
    for row in (
        SamplingRow(params=params, edits=LogitChanges(params).edits),
        SamplingRow(params=SamplingParams(), forbid=(9,)),
    ):
        failure = sample(torch.zeros(1, 4), [row], ReferenceKernels()).failures[0]
        assert isinstance(failure, IndexError)
        assert "9" in str(failure)
