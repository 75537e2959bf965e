"""The equation and the reading of PEFT's files, against PEFT itself in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_factory import make_base
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering import lower
from manyhats.adapters.methods.lora import lora_delta
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.reader import read_adapter

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

BASE = make_base()
TOKENS = torch.tensor([[1, 5, 9, 33, 2, 60, 17]])

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all linears": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rank-stabilised": {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["k_proj", "down_proj"],
    },
    "one layer": {"r": 2, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
    "gaussian": {"r": 2, "target_modules": ["gate_proj"], "init_lora_weights": "gaussian"},
    "regex of modules": {"r": 2, "target_modules": r".*layers\.0\.(self_attn|mlp)\..*proj"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "q_proj": 6, "model.layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3, r"mlp\.up_proj": 5, "up_proj": 100},
    },
    "patterns, rank-stabilised": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj|nothing": 9},
        "alpha_pattern": {"self_attn.v_proj": 2},
    },
}


@pytest.fixture(scope="module")
def base_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return tiny_llama().state_dict()


def tiny_llama() -> LlamaForCausalLM:
    """The model that ``BASE`` describes."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    )
    model.train(False)
    return model


def save_random_adapter(weights: dict[str, Tensor], config: dict[str, Any], directory: Path) -> Tensor:
    """Save a PEFT adapter with random matrices, and give its logits."""
    model = tiny_llama()
    model.load_state_dict(weights)
    peft: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    peft.train(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    peft.save_pretrained(str(directory))
    with torch.no_grad():
        logits: Tensor = peft(input_ids=TOKENS).logits
    return logits


def add_deltas(model: nn.Module, lowered: LoweredAdapter) -> None:
    """Add each delta to the output of its own linear."""
    modules = {site: path for path, site in BASE.modules.items()}
    for delta in lowered.deltas:

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, *, delta: Any = delta) -> Tensor:
            return output + lora_delta(args[0], delta.a, delta.b, delta.scale)

        model.get_submodule(modules[delta.site]).register_forward_hook(hook)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s(config: dict[str, Any], base_weights: dict[str, Tensor], tmp_path: Path) -> None:
    expected = save_random_adapter(base_weights, config, tmp_path)
    with open_source(str(tmp_path), [tmp_path]) as directory:
        read = read_adapter(directory, BASE, AdapterLimits())
    model = tiny_llama()
    model.load_state_dict(base_weights)
    with torch.no_grad():
        base = model(input_ids=TOKENS).logits
        add_deltas(model, lower(read.artifact, BASE))
        actual = model(input_ids=TOKENS).logits
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert read.notes  # a model made from a config alone has no name


def test_an_adapter_saved_under_another_name_is_found_in_its_subdirectory(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "french"
    )
    model.save_pretrained(str(tmp_path))
    with (
        open_source(str(tmp_path), [tmp_path]) as directory,
        pytest.raises(AdapterInvalidError, match="french"),
    ):
        read_adapter(directory, BASE, AdapterLimits())
    with open_source("french", [tmp_path]) as directory:
        assert len(lower(read_adapter(directory, BASE, AdapterLimits()).artifact, BASE).deltas) == 2


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_peft_saves_and_is_not_served_is_refused(
    config: dict[str, Any], key: str, base_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    save_untrained_adapter(base_weights, {"r": 2, "target_modules": ["q_proj"]} | config, tmp_path)
    with (
        open_source(str(tmp_path), [tmp_path]) as directory,
        pytest.raises(AdapterUnsupportedError) as caught,
    ):
        read_adapter(directory, BASE, AdapterLimits())
    assert key in caught.value.subject


def save_untrained_adapter(weights: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    """Save without running the model, which some variants cannot do on these inputs."""
    model = tiny_llama()
    model.load_state_dict(weights)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(str(directory))
