"""Prompt tuning, P-tuning and multitask prompt tuning: PEFT's directories here, and ours in PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter, PromptEmbeddings
from manyhats.adapters.sites import BaseDescription
from support.factories.prefixes import (
    make_multitask_prompt,
    make_p_tuning,
    make_prompt,
    tiny_base,
    tiny_model,
)
from support.oracles.primitives import logits_with

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 60, 17, 8, 41]])
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}

# Family, its config, and what the description says of its embedding multiplier.
FAMILIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("llama", {}, 1.0),
    "mistral": ("mistral", {"sliding_window": 4}, 1.0),
    "qwen2": ("qwen2", {}, 1.0),
    "gemma2": ("gemma2", GEMMA, 32**0.5),
    "gemma3": ("gemma3_text", GEMMA, 32**0.5),
    "granite": ("granite", {"embedding_multiplier": 7.0}, 7.0),
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt tuning from the vocabulary": lambda: PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "P-tuning, MLP": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=24
    ),
    "P-tuning, LSTM": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=12,
        encoder_num_layers=1,
    ),
    "multitask": lambda: MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_ranks=3
    ),
}


def read_prompt(directory: Path, base: BaseDescription) -> LoweredAdapter:
    with open_source(str(directory), [directory]) as source:
        return lower(read_adapter(source, base, AdapterLimits()).artifact, base)


@torch.no_grad()
def save_trained(model: Any, config: Any, directory: Path, task: int = 0) -> Tensor:
    """Save an adapter whose every parameter is random, and give its logits."""
    peft = get_peft_model(model, config)
    peft.train(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in peft.prompt_encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    peft.save_pretrained(str(directory))
    return peft_logits(peft, TOKENS, task)


def loaded_logits(model: Any, directory: Path, tokens: Tensor, task: int = 0) -> Tensor:
    peft = PeftModel.from_pretrained(model, str(directory))
    peft.train(False)
    return peft_logits(peft, tokens, task)


@torch.no_grad()
def peft_logits(peft: PeftModel, tokens: Tensor, task: int) -> Tensor:
    """Logits of the real tokens."""
    logits: Tensor = peft(input_ids=tokens, task_ids=torch.tensor([task])).logits
    return logits[0, -tokens.shape[1] :]


@pytest.mark.parametrize(("family", "config", "embedding_scale"), FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("peft_config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_prompt_that_peft_saved_gives_peft_s_logits(
    family: str,
    config: dict[str, Any],
    embedding_scale: float,
    peft_config: Callable[[], Any],
    tmp_path: Path,
) -> None:
    expected = save_trained(tiny_model(family, **config), peft_config(), tmp_path)
    base = tiny_base(family, head_dim=config.get("head_dim"), embedding_scale=embedding_scale)
    lowered = read_prompt(tmp_path, base)
    model = tiny_model(family, **config)
    plain = logits_with(model, replace(lowered, prefix=None), TOKENS)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits_with(model, lowered, TOKENS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        loaded_logits(tiny_model(family, **config), tmp_path, TOKENS), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("task", [0, 1, 2])
def test_one_of_several_tasks_is_the_one_that_the_config_says(task: int, tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_ranks=2, num_tasks=3
    )
    expected = save_trained(tiny_model(), config, tmp_path, task)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_task_id": task}))
    lowered = read_prompt(tmp_path, tiny_base())
    torch.testing.assert_close(logits_with(tiny_model(), lowered, TOKENS), expected, atol=1e-4, rtol=1e-4)
    # PEFT still reads it.
    torch.testing.assert_close(
        loaded_logits(tiny_model(), tmp_path, TOKENS, task), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("make", [make_prompt, make_p_tuning, make_multitask_prompt])
@settings(max_examples=8, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2"]),
    num_virtual=st.integers(1, 40),
    prompt=st.lists(st.integers(0, 63), min_size=1, max_size=24),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_prompt_made_here_gives_peft_s_logits_for_any_size_and_prompt(
    make: Callable[..., Path],
    family: str,
    num_virtual: int,
    prompt: list[int],
    seed: int,
    dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base, tokens = tiny_base(family), torch.tensor([prompt])
    directory = tmp_path_factory.mktemp("prompt")
    make(directory, base, num_virtual_tokens=num_virtual, seed=seed, dtype=dtype)
    lowered = read_prompt(directory, base)
    assert isinstance(lowered.prefix, PromptEmbeddings)
    expected = loaded_logits(tiny_model(family), directory, tokens)
    torch.testing.assert_close(
        logits_with(tiny_model(family), lowered, tokens), expected, atol=1e-4, rtol=1e-4
    )
