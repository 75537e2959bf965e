"""Chooses tokens as a step does, on kernels alone, for rows of every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.backend import Logits
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.wants import NO_TARGETS, TokenLogprob, Wants
from manyhats.engine.errors import NoTokenAllowedError
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import NO_EDITS, LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow, check_row, choices_of

V = 40
"""Tokens of the rows that are drawn."""


@dataclass(frozen=True)
class Sampled:
    """One token per row, -1 for those that failed, and its log-probability where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    failures: Mapping[int, Exception] = field(default_factory=dict)


def sample(logits: Tensor, rows: Sequence[SamplingRow], kernels: Any) -> Sampled:
    """Choose one token per row; what a row fails with ends that row."""
    return sample_from(HostLogits(logits, kernels), rows, logits.shape[1])


def sample_from(logits: Logits, rows: Sequence[SamplingRow], vocab_size: int) -> Sampled:
    """The same from a backend's logits."""
    failures: dict[int, Exception] = {}
    for index, row in enumerate(rows):
        try:
            check_row(row, vocab_size)
        except Exception as error:  # noqa: BLE001 whatever it is
            failures[index] = error
    sound = [index for index in range(len(rows)) if index not in failures]
    choices = choices_of([rows[index] for index in sound], sound, vocab_size)
    outcome = logits.finish(Wants(choices, NO_TARGETS, np.empty(0, np.int32))).result()
    tokens = dict(zip(sound, outcome.tokens, strict=True))
    failures |= {index: NoTokenAllowedError() for index, token in tokens.items() if token.id < 0}
    return Sampled(
        [tokens[index].id if index in tokens else -1 for index in range(len(rows))],
        [tokens[index].logprob if index in tokens else None for index in range(len(rows))],
        failures,
    )


def mask_of(allowed: Sequence[bool]) -> npt.NDArray[np.int32]:
    """The words of a mask."""
    bits = np.packbits(np.array(allowed, dtype=np.bool_), bitorder="little")
    words = np.zeros(-(-len(allowed) // 32) * 4, np.uint8)
    words[: bits.size] = bits
    return words.view(np.int32)


def check_alike(found: Sampled, expected: Sampled) -> None:
    """The same tokens and ranks; log-probabilities as far as float32 goes."""
    assert found.token_ids == expected.token_ids
    for logprob, other in zip(found.logprobs, expected.logprobs, strict=True):
        if logprob is None or other is None:
            assert logprob is other is None
            continue
        assert (logprob.rank, logprob.top_ids) == (other.rank, other.top_ids)
        assert logprob.logprob == pytest.approx(other.logprob, rel=1e-6, abs=2e-6)
        assert list(logprob.top_logprobs) == pytest.approx(list(other.top_logprobs), rel=1e-6, abs=2e-6)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    ids = st.integers(0, V - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 20, 100])),
        top_p=draw(st.sampled_from([1.0, 0.05, 0.5, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        typical_p=draw(st.sampled_from([1.0, 0.05, 0.5, 0.9])),
        repetition_penalty=draw(st.sampled_from([1.0, 0.7, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, -1.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -1.0, 0.5])),
        logit_bias=draw(st.dictionaries(ids, st.floats(-5, 5), max_size=3)),
    )


@st.composite
def sampling_rows(draw: st.DrawFn) -> SamplingRow:
    ids = st.integers(0, V - 1)
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=V, max_size=V).filter(lambda m: sum(m) > 4))
    params = draw(sampling_params())
    prompt, output = draw(st.lists(ids, max_size=5)), draw(st.lists(ids, max_size=5))
    return SamplingRow(
        params=params,
        seed=draw(st.integers(0, 2**64 - 1)),
        step=draw(st.integers(0, 5)),
        edits=draw(st.sampled_from([NO_EDITS, LogitChanges(params, prompt, output).edits])),
        forbid=tuple(draw(st.lists(ids, max_size=2))),
        allowed=None if allowed is None else mask_of(allowed),
        num_logprobs=draw(st.sampled_from([None, 0, 2])),
    )
