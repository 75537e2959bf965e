from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manyhats.engine.backends.backend import Backend
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.torch.backend import TorchBackend
from manyhats.engine.checkpoints.loader import LoadedModel
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Ran, Runner, load_tiny, random_ids
from support.oracles.transformers import dequantize_into, full_logits, load_transformers

TOLERANCE = 1e-4
LENGTHS = (1, 5, 16, 17, 33, 64, 90)
CROWD = [Prompt(random_ids(length, length, 300), new_tokens=20) for length in (30, 28)]
"""They fit together in five blocks at first, and not to their end."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie": True},
    "llama, all biases": {"attention_bias": True, "mlp_bias": True},
    "llama, no grouping": {"heads": 4, "kv_heads": 4},
    "llama, seven heads a group": {"heads": 7, "kv_heads": 1, "hidden_size": 112},
    "llama, three heads a group": {"heads": 6, "kv_heads": 2, "hidden_size": 96, "num_layers": 3},
    "llama, odd vocabulary": {"vocab_size": 323},
    "mistral": {"family": "mistral"},
    "mistral, window": {"family": "mistral", "sliding_window": 20},
    "mistral, window of one": {"family": "mistral", "sliding_window": 1},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, window": {"family": "qwen2", "tie": True, "sliding_window": 18, "num_layers": 3},
}


@pytest.fixture(scope="module", params=list(MODELS.values()), ids=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("parity") / "model", seed=3, **request.param)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [
        Prompt(random_ids(length, length, TINY_VOCAB_SIZE), new_tokens=3 + index % 3)
        for index, length in enumerate(LENGTHS)
    ]


def assert_equals_transformers(runs: list[Ran], model: nn.Module) -> None:
    for ran in runs:
        expected = full_logits(model, ran.token_ids)
        for position, logits in ran.logits.items():
            torch.testing.assert_close(logits, expected[position], atol=TOLERANCE, rtol=TOLERANCE)


def assert_same_bits(runs: list[Ran], others: list[Ran]) -> None:
    for ran, other in zip(runs, others, strict=True):
        assert ran.token_ids == other.token_ids
        for position in ran.logits.keys() & other.logits.keys():
            assert torch.equal(ran.logits[position], other.logits[position]), position


@pytest.mark.bits
def test_logits_equal_transformers_in_ragged_batches_however_they_are_scheduled(
    checkpoint: Path, prompts: list[Prompt]
) -> None:
    runner = Runner(load_tiny(checkpoint))
    runs = runner.run(prompts, all_logits=True)
    assert_equals_transformers(runs, load_transformers(checkpoint))
    for prompt, ran in zip(prompts, runs, strict=True):
        assert len(ran.logits) == len(ran.token_ids) == len(prompt.token_ids) + prompt.new_tokens
    chunked = runner.run(prompts, all_logits=True, max_tokens=13)
    assert_same_bits(runs, chunked)
    crowded = runner.run(CROWD, all_logits=True, max_tokens=24, num_blocks=5)
    assert sum(ran.num_preemptions for ran in crowded) > 0
    assert_same_bits(crowded, runner.run(CROWD, all_logits=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "model", seed=5)


def test_each_sequence_alone_and_on_one_thread_is_the_same_bits(llama: Path, prompts: list[Prompt]) -> None:
    model = load_tiny(llama)
    together = Runner(model, CpuBackend(2)).run(prompts, all_logits=True)
    alone = Runner(model, CpuBackend(1))
    for prompt, ran in zip(prompts, together, strict=True):
        assert_same_bits(alone.run([prompt], all_logits=True, max_tokens=7), [ran])


def test_a_prefix_cache_hit_is_the_same_bits(llama: Path) -> None:
    runner = Runner(load_tiny(llama))
    head = random_ids(1, 50, TINY_VOCAB_SIZE)
    prompts = [
        Prompt(head + random_ids(seed, 9 * seed, TINY_VOCAB_SIZE), joins=joins)
        for seed, joins in ((2, 0), (3, 4), (0, 4), (4, 9))
    ]
    cold = runner.run(prompts)
    warm = runner.run(prompts, prefix_cache=True)
    assert [ran.num_cached_tokens for ran in warm] == [0, 48, 48, 48]
    assert_same_bits(cold, warm)
    warm = runner.run(prompts, prefix_cache=True, max_tokens=16)
    assert_same_bits(cold, warm)


def test_both_backends_agree(llama: Path, prompts: list[Prompt]) -> None:
    model = load_tiny(llama)
    short = [Prompt(prompt.token_ids[:20], new_tokens=2) for prompt in prompts[:4]]
    numba = Runner(model, CpuBackend()).run(short, all_logits=True)
    torch_only = Runner(model, TorchBackend()).run(short, all_logits=True, max_tokens=9)
    for ran, other in zip(numba, torch_only, strict=True):
        assert ran.token_ids == other.token_ids
        torch.testing.assert_close(ran.stacked, other.stacked, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("tie", [False, True])
def test_nf4_equals_the_float32_model_of_the_dequantized_weights(tie: bool, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", tie=tie, dtype=torch.bfloat16, intermediate_size=192)
    loaded = load_tiny(directory, "nf4")
    oracle = load_transformers(directory)
    dequantize_into(oracle, loaded)
    prompts = [Prompt(random_ids(length, length, TINY_VOCAB_SIZE)) for length in LENGTHS]
    runner = Runner(loaded)
    runs = runner.run(prompts, all_logits=True)
    assert_equals_transformers(runs, oracle)
    assert_same_bits(runs, runner.run(prompts, all_logits=True, max_tokens=11))
    crowded = runner.run(CROWD, all_logits=True, max_tokens=24, num_blocks=5)
    assert sum(ran.num_preemptions for ran in crowded) > 0
    assert_same_bits(crowded, runner.run(CROWD, all_logits=True))


@pytest.mark.parametrize("backend", [CpuBackend, TorchBackend])
def test_int8_keys_and_values_stay_near_and_keep_the_invariant(
    backend: type[CpuBackend | TorchBackend], llama: Path, prompts: list[Prompt]
) -> None:
    model = load_tiny(llama)
    chosen = (
        prompts if backend is CpuBackend else [Prompt(p.token_ids[:20], new_tokens=2) for p in prompts[:4]]
    )
    runner = Runner(model, backend(), cache_dtype="int8")
    runs = runner.run(chosen, all_logits=True)
    assert_same_bits(runs, runner.run(chosen, all_logits=True, max_tokens=10))
    assert_same_bits(runner.run(chosen, prefix_cache=True), runner.run(chosen))
    crowded = runner.run(CROWD, all_logits=True, max_tokens=24, num_blocks=5)
    assert sum(ran.num_preemptions for ran in crowded) > 0
    assert_same_bits(crowded, runner.run(CROWD, all_logits=True))
    exact = Runner(model).run([Prompt(ran.token_ids, new_tokens=0) for ran in runs], all_logits=True)
    for ran, oracle in zip(runs, exact, strict=True):
        difference = ran.stacked.log_softmax(-1) - oracle.stacked.log_softmax(-1)
        assert 0 < difference.abs().mean() < 0.1


def test_both_backends_round_to_int8_alike(llama: Path, prompts: list[Prompt]) -> None:
    model = load_tiny(llama)
    short = [Prompt(prompt.token_ids[:20], new_tokens=0) for prompt in prompts[:4]]
    ours, theirs = (
        Runner(model, backend, cache_dtype="int8").run(short, all_logits=True)
        for backend in (CpuBackend(), TorchBackend())
    )
    for ran, other in zip(ours, theirs, strict=True):
        # A value between two steps may be rounded either way: a hundredth of the error of rounding at all.
        assert (ran.stacked - other.stacked).abs().mean() < 1e-3


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_bfloat16_storage_stays_near_and_keeps_the_invariant(
    quantization: Any, llama: Path, prompts: list[Prompt]
) -> None:
    model = load_tiny(llama, quantization, torch.bfloat16)
    runner = Runner(model, cache_dtype="bfloat16")
    runs = runner.run(prompts, all_logits=True)
    assert_same_bits(runs, runner.run(prompts, all_logits=True, max_tokens=10))
    exact = Runner(load_tiny(llama, quantization)).run(
        [Prompt(ran.token_ids, new_tokens=0) for ran in runs], all_logits=True
    )
    for ran, oracle in zip(runs, exact, strict=True):
        difference = ran.stacked.log_softmax(-1) - oracle.stacked.log_softmax(-1)
        assert 0 < difference.abs().mean() < 0.1


def test_a_model_is_what_its_bytes_say(llama: Path) -> None:
    """Resident bytes: NF4 linears, and a tied head counted once."""

    def bytes_of(model: LoadedModel, backend: Backend | None = None) -> tuple[int, int]:
        num_bytes = Runner(model, backend).model.num_bytes
        return num_bytes["base"], num_bytes["embeddings"]

    model = load_tiny(llama)
    num_linear = sum(linear.in_features * linear.out_features for linear in model.weights.linears())
    dense, embeddings = bytes_of(model)
    assert 4 * num_linear <= dense <= 4 * num_linear * 1.05
    assert embeddings >= 2 * 4 * TINY_VOCAB_SIZE * 64
    assert bytes_of(load_tiny(llama, "nf4"), CpuBackend())[0] < dense / 5
