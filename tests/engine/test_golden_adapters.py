"""AdapterHub's own numbers, through the whole way: registered, stored, loaded, and all in one engine's batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.checkpoints.loader import load_model
from manyhats.engine.request import ResponseOptions
from support.factories.default_model import DEFAULT_MODEL, default_model_directory
from support.harnesses.engine import Answer, collect, make_request, running_engine
from support.oracles.golden import ADAPTERHUB_FIXTURES, GOLDEN, adapterhub_directory, needs_golden

pytestmark = [pytest.mark.real_model, needs_golden]

NUM_PROMPTS = 3
NUM_GREEDY = 16
FIXTURES = pytest.mark.parametrize("fixture", ADAPTERHUB_FIXTURES)
FLOAT32 = pytest.mark.parametrize("variant", ["dense", "nf4"])
RESPONSE = ResponseOptions(logprobs=True, top_logprobs=100, prompt_logprobs=True)
Answers = Mapping[tuple[str, int], Answer]
"""(fixture, prompt) → answer."""


class Expected:
    """What the library gave for one fixture."""

    def __init__(self, fixture: str, variant: str) -> None:
        self._arrays = np.load(GOLDEN / fixture / f"expected_{variant}.npz")

    def __call__(self, prompt: int, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[f"p{prompt}_{name}"])


@pytest.fixture(scope="module")
def answers_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Answers]:
    """All prompts of all fixtures in flight together, by variant and dtype; run once each."""

    @cache
    def run(variant: str, dtype: str) -> Answers:
        quantization: Any = "none" if variant == "dense" else variant
        model = load_model(
            DEFAULT_MODEL,
            quantization=quantization,
            dtype=getattr(torch, dtype),
            max_context_length=256,
        )
        directory = tmp_path_factory.mktemp(f"{variant}-{dtype}")
        sources = {
            fixture: adapterhub_directory(fixture, directory / fixture) for fixture in ADAPTERHUB_FIXTURES
        }

        async def answer_all(store: AdapterStore) -> list[Answer]:
            records = {
                name: store.register(Registration(name.replace("_", "-"), Uri(str(path)))).record
                for name, path in sources.items()
            }
            # 48 tokens a step cut the prompts' rows into chunks, and mix them with decodes.
            async with running_engine(
                model,
                store.lower,
                dtype=dtype,
                kv_cache_bytes=64 << 20,
                max_num_sequences=32,
                max_num_batched_tokens=48,
            ) as engine:
                return await asyncio.gather(
                    *(collect(engine, request_of(records[name], name, i)) for name, i in calls)
                )

        calls = [(name, prompt) for name in ADAPTERHUB_FIXTURES for prompt in range(NUM_PROMPTS)]
        with closing(open_store(directory / "store", model.description, [directory, GOLDEN])) as store:
            return dict(zip(calls, asyncio.run(answer_all(store)), strict=True))

    default_model_directory()
    return run


def request_of(record: AdapterRecord, fixture: str, prompt: int) -> Any:
    ids = Expected(fixture, "dense")(prompt, "ids").tolist()
    return make_request(ids, record, new_tokens=NUM_GREEDY, response=RESPONSE)


def next_logprobs(answer: Answer) -> Tensor:
    return torch.tensor([token.logprob for token in answer.prompt_tokens[1:]])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected.float(), atol=tolerance, rtol=0)


def assert_greedy(answer: Answer, expected: Expected, prompt: int, tolerance: float) -> None:
    """The same tokens up to the first whose lead over the runner-up is within twice the tolerance."""
    margins = expected(prompt, "greedy_margin")
    unsure = (margins <= 2 * tolerance).nonzero()
    count = int(unsure[0]) if len(unsure) else len(margins)
    assert answer.token_ids[:count] == expected(prompt, "greedy_ids")[:count].tolist()


@FLOAT32
@FIXTURES
def test_float32_gives_the_librarys_log_probabilities_and_tokens(
    fixture: str, variant: str, answers_of: Callable[[str, str], Answers]
) -> None:
    expected = Expected(fixture, variant)
    answers = answers_of(variant, "float32")
    for prompt in range(NUM_PROMPTS):
        answer = answers[fixture, prompt]
        assert_close(next_logprobs(answer), expected(prompt, "next_logprob"), 1e-3)
        assert_greedy(answer, expected, prompt, 1e-3)
        if answer.token_ids == expected(prompt, "greedy_ids").tolist():
            found = torch.tensor([token.logprob for token in answer.tokens])
            assert_close(found, expected(prompt, "greedy_logprob"), 1e-3)


@FLOAT32
@FIXTURES
def test_float32_gives_the_librarys_best_tokens_at_every_position(
    fixture: str, variant: str, answers_of: Callable[[str, str], Answers]
) -> None:
    expected = Expected(fixture, variant)
    for prompt in range(NUM_PROMPTS):
        answer = answers_of(variant, "float32")[fixture, prompt]
        for position, token in enumerate((*answer.prompt_tokens[1:], answer.tokens[0])):
            found = {top.id: top.logprob for top in token.top}
            ids = expected(prompt, "top10_ids")[position].tolist()
            logits = expected(prompt, "top10_logits")[position].double()
            leads = torch.tensor([found[i] - found[ids[0]] for i in ids], dtype=torch.float64)
            torch.testing.assert_close(leads, logits - logits[0], atol=1e-3, rtol=0)
        last = expected(prompt, "last_logits").double().log_softmax(-1)
        found_best = torch.tensor([top.logprob for top in answer.tokens[0].top], dtype=torch.float64)
        best = last[[top.id for top in answer.tokens[0].top]]
        torch.testing.assert_close(found_best, best, atol=1e-3, rtol=0)


@FIXTURES
def test_bfloat16_stays_within_four_hundredths_of_a_nat(
    fixture: str, answers_of: Callable[[str, str], Answers]
) -> None:
    expected = Expected(fixture, "nf4")
    answers = answers_of("nf4", "bfloat16")
    errors = [
        next_logprobs(answers[fixture, prompt]) - expected(prompt, "next_logprob")
        for prompt in range(NUM_PROMPTS)
    ]
    assert torch.cat(errors).abs().mean() <= 0.04
    for prompt in range(NUM_PROMPTS):
        assert_greedy(answers[fixture, prompt], expected, prompt, 0.2)


def test_every_fixture_beside_the_checkout_is_compared_with() -> None:
    found = {path.name for path in Path(GOLDEN).glob("adapterhub_*")}
    assert found == set(ADAPTERHUB_FIXTURES)
