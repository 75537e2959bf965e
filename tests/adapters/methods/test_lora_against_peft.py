"""The equation and the reading of PEFT's files, against PEFT itself in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError, BaseMismatchError
from manyhats.adapters.primitives import Affine, EmbeddingLowRank, LowRank
from manyhats.adapters.sites import Site
from support.oracles.peft import (
    PEFT_FAMILIES,
    check_against_peft,
    make_peft,
    read,
    read_lowered,
    save_peft,
    tiny_model,
)
from support.oracles.primitives import describe_model

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

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
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 3}},
    "embedding and head": {
        "r": 4,
        "target_modules": ["embed_tokens", "lm_head"],
        "rank_pattern": {"embed_tokens": 3},
    },
}


def make(model: Any, directory: Path, **config: Any) -> Path:
    return save_peft(make_peft(model, LoraConfig(task_type="CAUSAL_LM", **config)), directory)


@pytest.mark.parametrize("family", PEFT_FAMILIES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    check_against_peft(model, make(model, tmp_path, **config))


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embedding_and_head_of_a_tied_base(modules: list[str], ensure: bool, tmp_path: Path) -> None:
    model = tiny_model(tie=True)
    config = {"target_modules": ["q_proj", *modules], "ensure_weight_tying": ensure}
    lowered = check_against_peft(model, make(model, tmp_path, r=4, **config))
    has_embedding = any(isinstance(delta, EmbeddingLowRank) for delta in lowered.deltas)
    has_head = any(
        isinstance(delta, LowRank) and delta.site == Site(-1, "lm_head") for delta in lowered.deltas
    )
    assert has_embedding == (ensure or "embed_tokens" in modules)
    assert has_head == (ensure or "lm_head" in modules)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite"])
def test_an_embedding_s_delta_counts_before_the_architecture_s_multiplier(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    check_against_peft(model, make(model, tmp_path, r=4, target_modules=["embed_tokens", "v_proj"]))


def test_fused_projections_are_split_by_their_parts(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    config = {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 3}, "lora_bias": True}
    lowered = check_against_peft(model, make(model, tmp_path, r=4, **config))
    sites = {delta.site.name for delta in lowered.deltas if isinstance(delta, LowRank)}
    assert sites == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    offsets = {delta.site: delta.offset for delta in lowered.deltas if isinstance(delta, Affine)}
    offset = offsets[Site(1, "k_proj")]
    assert offset is not None
    assert offset.shape == (16,)


def test_an_adapter_saved_under_another_name_is_found_in_its_subdirectory(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = tiny_model()
    base = describe_model(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config, "french").save_pretrained(str(tmp_path))
    with pytest.raises(AdapterInvalidError, match="french"):
        read(tmp_path, base)
    assert len(read_lowered(tmp_path / "french", base).deltas) == 2


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "lm_head"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, "lm_head"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
        ({"modules_to_save": ["down_proj"]}, "modules_to_save"),
    ],
)
def test_what_peft_saves_and_is_not_served_is_refused(
    config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    model = tiny_model()
    base = describe_model(model)
    make(model, tmp_path, **({"r": 2, "target_modules": ["q_proj"]} | config))
    with pytest.raises(AdapterUnsupportedError) as caught:
        read(tmp_path, base)
    assert key in caught.value.subject


def test_trained_biases_of_the_base_are_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    make(model, tmp_path, r=2, target_modules=["q_proj"], bias="all")
    with pytest.raises(AdapterUnsupportedError, match="a trained bias of the base") as caught:
        read(tmp_path, describe_model(model))
    assert caught.value.subject.endswith(".bias")


def test_trained_biases_of_a_base_without_any_are_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    check_against_peft(model, make(model, tmp_path, r=2, target_modules=["q_proj"], bias="all"))


def test_a_head_saved_along_must_be_the_base_s(tmp_path: Path) -> None:
    """PEFT would load it over the base's own."""
    model = tiny_model()
    make(model, tmp_path, r=2, target_modules=["lm_head"])
    model.lm_head.weight.data[3] += 0.1
    with pytest.raises(BaseMismatchError, match="its values differ from the base's") as caught:
        read(tmp_path, describe_model(model))
    assert caught.value.subject == "base_model.model.lm_head.base_layer.weight"


def test_a_head_saved_along_may_be_rounded_to_bfloat16(tmp_path: Path) -> None:
    model = tiny_model()
    make(model, tmp_path, r=2, target_modules=["lm_head"])
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()
    assert len(read_lowered(tmp_path, describe_model(model)).deltas) == 1
