from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.checkpoints.loader import load_model
from support.factories.default_model import DEFAULT_MODEL, default_model_directory
from support.harnesses.engine import Prompt, Ran, Runner
from support.oracles.golden import GOLDEN, needs_golden

pytestmark = [pytest.mark.real_model, needs_golden]
FIXTURE = GOLDEN / "base"


class Expected:
    """One variant's numbers: prompt i's arrays by name."""

    def __init__(self, variant: str) -> None:
        self._arrays = np.load(FIXTURE / f"expected_{variant}.npz")
        self.num_prompts = len(json.loads((FIXTURE / "manifest.json").read_text())["prompts"])

    def __call__(self, prompt: int, name: str) -> Any:
        return self._arrays[f"p{prompt}_{name}"]

    def prompts(self) -> list[Prompt]:
        """Each fixture prompt, and its continuation fed as it was chosen there."""
        return [
            Prompt([*self(i, "ids").tolist(), *self(i, "greedy_ids").tolist()], new_tokens=0)
            for i in range(self.num_prompts)
        ]


@pytest.fixture(scope="module")
def runner_of() -> Callable[..., Runner]:
    """The default model by quantization, dtype, and that of keys and values if it is another; loaded once each."""

    @cache
    def load(quantization: Any, dtype: str, cache_dtype: str = "") -> Runner:
        model = load_model(
            DEFAULT_MODEL, quantization=quantization, dtype=getattr(torch, dtype), max_context_length=512
        )
        backend = CpuBackend(1, is_exact=dtype == "float32")
        return Runner(model, backend, cache_dtype=cache_dtype or dtype, num_blocks=32)

    default_model_directory()
    return load


def run(runner: Runner, expected: Expected) -> list[Ran]:
    return runner.run(expected.prompts(), all_logits=True, max_tokens=40)


def logprobs_of_next(ran: Ran, num_prompt: int) -> torch.Tensor:
    targets = torch.tensor(ran.token_ids[1:num_prompt]).unsqueeze(1)
    return ran.stacked[: num_prompt - 1].log_softmax(-1).gather(1, targets).squeeze(1)


def assert_greedy(ran: Ran, expected: Expected, prompt: int, tolerance: float) -> None:
    """The same tokens, wherever the lead over the runner-up is more than twice the tolerance."""
    num_prompt = len(expected(prompt, "ids"))
    chosen = ran.stacked[num_prompt - 1 : -1].argmax(-1).numpy()
    sure = expected(prompt, "greedy_margin") > 2 * tolerance
    assert sure.any()
    assert np.array_equal(chosen[sure], expected(prompt, "greedy_ids")[sure])


@pytest.mark.parametrize(("variant", "quantization"), [("dense", "none"), ("nf4", "nf4")])
def test_float32_reproduces_every_number(
    variant: str, quantization: str, runner_of: Callable[[str, str], Runner]
) -> None:
    expected = Expected(variant)
    for prompt, ran in enumerate(run(runner_of(quantization, "float32"), expected)):
        ids = expected(prompt, "ids")
        count = len(ids)
        last = torch.from_numpy(expected(prompt, "last_logits"))
        torch.testing.assert_close(ran.logits[count - 1], last, atol=1e-3, rtol=0)
        next_logprob = torch.from_numpy(expected(prompt, "next_logprob"))
        torch.testing.assert_close(logprobs_of_next(ran, count), next_logprob, atol=1e-3, rtol=0)
        top_ids = torch.from_numpy(expected(prompt, "top10_ids")).long()
        top = torch.from_numpy(expected(prompt, "top10_logits"))
        torch.testing.assert_close(ran.stacked[:count].gather(1, top_ids), top, atol=1e-3, rtol=0)
        assert_greedy(ran, expected, prompt, tolerance=1e-3)
        margins = ran.stacked[count - 1 : -1].topk(2).values
        margin = torch.from_numpy(expected(prompt, "greedy_margin"))
        torch.testing.assert_close(margins[:, 0] - margins[:, 1], margin, atol=2e-3, rtol=0)


def test_bfloat16_stays_within_four_hundredths_of_a_nat(runner_of: Callable[[str, str], Runner]) -> None:
    expected = Expected("nf4")
    for prompt, ran in enumerate(run(runner_of("nf4", "bfloat16"), expected)):
        count = len(expected(prompt, "ids"))
        error = logprobs_of_next(ran, count) - torch.from_numpy(expected(prompt, "next_logprob"))
        assert error.abs().mean() <= 0.04
        last = torch.from_numpy(expected(prompt, "last_logits"))
        difference = ran.logits[count - 1].log_softmax(-1) - last.log_softmax(-1)
        assert difference.abs().mean() <= 0.04 * last.std()
        assert_greedy(ran, expected, prompt, tolerance=0.04)


def test_int8_keys_and_values_cost_less_than_a_twentieth_of_a_nat(runner_of: Callable[..., Runner]) -> None:
    expected = Expected("nf4")
    for prompt, ran in enumerate(run(runner_of("nf4", "float32", "int8"), expected)):
        count = len(expected(prompt, "ids"))
        error = logprobs_of_next(ran, count) - torch.from_numpy(expected(prompt, "next_logprob"))
        assert 0 < error.abs().mean() <= 0.05
        assert_greedy(ran, expected, prompt, tolerance=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_model_gives_each_prompt_the_same_bits_alone_and_in_a_batch(
    dtype: str, runner_of: Callable[[str, str], Runner]
) -> None:
    runner = runner_of("nf4", dtype)
    prompts = [Prompt(prompt.token_ids[:20], new_tokens=3) for prompt in Expected("nf4").prompts()]
    together = runner.run(prompts, max_tokens=33)
    for prompt, ran in zip(prompts[1:], together[1:], strict=True):
        alone = runner.run([prompt], max_tokens=9)[0]
        assert alone.token_ids == ran.token_ids
        assert torch.equal(alone.stacked, ran.stacked)
