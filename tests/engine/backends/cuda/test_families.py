"""Every family on the kernels as plain torch has it."""

from __future__ import annotations

import support.gpu.interpreter  # noqa: F401  isort: skip

from pathlib import Path
from typing import Any

import pytest

from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.gpu.models import assert_as_good_as_torch
from support.harnesses.engine import Prompt, load_tiny, random_ids, random_lora

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"tie": True},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "num_layers": 3},
    "phi3": {},
    "phi": {},
    "granite": {},
    "olmo2": {},
    "smollm3": {"num_layers": 3},
    "gpt2": {},
    "gptj": {},
    "gpt_neox": {},
    "opt": {},
    "falcon": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 4},
    "mixtral": {},
    "qwen3_moe": {"num_layers": 3, "mlp_only_layers": [1]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_exact_as_plain_torch(family: str, tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "tiny", seed=5, **{"family": family, **FAMILIES[family]}))
    prompts = [
        Prompt(random_ids(i, (4, 1, 2)[i], TINY_VOCAB_SIZE), slot=i % 2, new_tokens=1) for i in range(3)
    ]
    assert_as_good_as_torch(model, prompts, adapters={1: random_lora(model.description, 1)})
