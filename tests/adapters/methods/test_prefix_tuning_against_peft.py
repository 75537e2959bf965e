"""Prefix tuning and cartridges: PEFT's directories read here, and directories made here read by PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import KVPrefix, LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from support.factories.prefixes import make_prefix, tiny_base, tiny_model
from support.oracles.primitives import logits_with

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 60, 17, 8, 41]])
WINDOWED = {"sliding_window": 4}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED}

# Family, its config, P. Windows of 4 are shorter than the prompt, and some than the prefix.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 3),
    "llama, one head of keys": ("llama", {"num_key_value_heads": 1}, 5),
    "llama, as many heads of keys": ("llama", {"num_key_value_heads": 4}, 1),
    "llama, wide heads": ("llama", {"head_dim": 24}, 6),
    "mistral": ("mistral", {"sliding_window": None}, 4),
    "mistral, windows": ("mistral", WINDOWED, 2),
    "mistral, windows shorter than the prefix": ("mistral", WINDOWED, 7),
    "qwen2": ("qwen2", {}, 4),
    "qwen2, a window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, **WINDOWED},
        6,
    ),
    "qwen3": ("qwen3", {"head_dim": 8}, 3),
    "gemma2, windows": ("gemma2", GEMMA, 6),
    "gemma3, windows": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}, 6),
    "granite": ("granite", {"embedding_multiplier": 7.0, "residual_multiplier": 0.5}, 3),
}


def base_for(family: str, config: dict[str, Any]) -> BaseDescription:
    return tiny_base(
        family, num_kv_heads=config.get("num_key_value_heads", 2), head_dim=config.get("head_dim")
    )


def read_prefix(directory: Path, base: BaseDescription) -> LoweredAdapter:
    with open_source(str(directory), [directory]) as source:
        return lower(read_adapter(source, base, AdapterLimits()).artifact, base)


@torch.no_grad()
def save_trained(model: Any, config: Any, directory: Path) -> Tensor:
    """Save an adapter whose every parameter is random, and give its logits."""
    peft = get_peft_model(model, config)
    peft.train(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in peft.prompt_encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    peft.save_pretrained(str(directory))
    logits: Tensor = peft(input_ids=TOKENS).logits
    return logits[0]


@torch.no_grad()
def loaded_logits(model: Any, directory: Path, tokens: Tensor) -> Tensor:
    peft = PeftModel.from_pretrained(model, str(directory))
    peft.train(False)
    logits: Tensor = peft(input_ids=tokens).logits
    return logits[0]


@pytest.mark.parametrize(("family", "config", "num_virtual"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("with_projection", [False, True], ids=["stored", "projected"])
def test_a_prefix_that_peft_saved_gives_peft_s_logits(
    family: str, config: dict[str, Any], num_virtual: int, with_projection: bool, tmp_path: Path
) -> None:
    expected = save_trained(
        tiny_model(family, **config),
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=num_virtual, prefix_projection=with_projection
        ),
        tmp_path,
    )
    base = base_for(family, config)
    lowered = read_prefix(tmp_path, base)
    model = tiny_model(family, **config)
    plain = logits_with(model, replace(lowered, prefix=None), TOKENS)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits_with(model, lowered, TOKENS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        loaded_logits(tiny_model(family, **config), tmp_path, TOKENS), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@settings(max_examples=8, deadline=None)
@given(
    num_virtual=st.integers(1, 40),
    prompt=st.lists(st.integers(0, 63), min_size=1, max_size=24),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_prefix_made_here_gives_peft_s_logits_for_any_size_and_prompt(
    family: str,
    num_virtual: int,
    prompt: list[int],
    seed: int,
    dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base, tokens = tiny_base(family), torch.tensor([prompt])
    directory = tmp_path_factory.mktemp("prefix")
    make_prefix(directory, base, num_virtual_tokens=num_virtual, seed=seed, dtype=dtype)
    expected = loaded_logits(tiny_model(family), directory, tokens)
    actual = logits_with(tiny_model(family), read_prefix(directory, base), tokens)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_frozen", [0, 1, 5])
def test_a_cartridge_is_a_prefix(num_frozen: int, tmp_path: Path) -> None:
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=num_frozen)
    expected = save_trained(tiny_model(), config, tmp_path)
    lowered = read_prefix(tmp_path, tiny_base())
    assert isinstance(lowered.prefix, KVPrefix)
    torch.testing.assert_close(logits_with(tiny_model(), lowered, TOKENS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded_logits(tiny_model(), tmp_path, TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_a_prefix_of_zeros_still_takes_its_share_of_attention(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero")
    peft = get_peft_model(tiny_model(), config)
    peft.save_pretrained(str(tmp_path))
    lowered = read_prefix(tmp_path, tiny_base())
    expected = loaded_logits(tiny_model(), tmp_path, TOKENS)
    torch.testing.assert_close(logits_with(tiny_model(), lowered, TOKENS), expected, atol=1e-4, rtol=1e-4)
    plain = logits_with(tiny_model(), replace(lowered, prefix=None), TOKENS)
    assert (expected - plain).abs().max() > 1e-2
