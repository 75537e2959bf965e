"""Whole embeddings and heads that PEFT trains and saves beside LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, VeraConfig
from safetensors.torch import load_file
from torch import Tensor

from manyhats.adapters.errors import AdapterError, AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.primitives import EmbeddingRows, HeadWeight
from support.factories.adapters import lora_config, lora_tensors, make_base, write_adapter
from support.oracles.peft import check_against_peft, make_peft, read, save_peft, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

BASE = make_base()
EMBEDDING = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"


def make(model: Any, directory: Path, **config: Any) -> Path:
    peft = make_peft(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **config))
    return save_peft(peft, directory)


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_saved_modules_equal_peft_s(modules: list[str], tie: bool, ensure: bool, tmp_path: Path) -> None:
    model = tiny_model(tie=tie)
    make(model, tmp_path, modules_to_save=modules, ensure_weight_tying=ensure)
    lowered = check_against_peft(model, tmp_path)
    is_one = tie and ensure
    has_head = any(isinstance(delta, HeadWeight) for delta in lowered.deltas)
    has_embedding = any(isinstance(delta, EmbeddingRows) for delta in lowered.deltas)
    assert has_head == (is_one or "lm_head" in modules)
    assert has_embedding == (is_one or "embed_tokens" in modules)


@pytest.mark.parametrize("config", [AdaLoraConfig(total_step=9, init_r=3), VeraConfig(r=4)])
def test_other_methods_may_save_modules_too(config: Any, tmp_path: Path) -> None:
    model = tiny_model()
    config.task_type, config.target_modules = "CAUSAL_LM", {"q_proj"}
    config.modules_to_save = ["lm_head", "embed_tokens"]
    save_peft(make_peft(model, config), tmp_path)
    check_against_peft(model, tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_saved_embedding_is_multiplied_as_the_base_s_is(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie=True)
    make(model, tmp_path, modules_to_save=["embed_tokens"])
    check_against_peft(model, tmp_path)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]])
def test_weights_that_no_field_names_replace_the_base_s(names: list[str], tie: bool, tmp_path: Path) -> None:
    """As ``save_embedding_layers`` saves them; PEFT loads them over the base, so a tied base has them twice."""
    model = tiny_model(tie=tie)
    make(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)) * 0.3
    for name in names:
        tensors[name] = weight.clone()
    write_adapter(tmp_path, config, tensors)
    check_against_peft(model, tmp_path)


def spoilt(**tensors: Tensor) -> dict[str, Tensor]:
    return {EMBEDDING if name == "embedding" else HEAD: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tied", "fields", "tensors", "error", "subject"),
    [
        (False, {"modules_to_save": ["lm_head"]}, {}, AdapterInvalidError, "modules_to_save"),
        (False, {"modules_to_save": "lm_head"}, {}, AdapterInvalidError, "modules_to_save"),
        (False, {"modules_to_save": [3]}, {}, AdapterInvalidError, "modules_to_save"),
        (False, {"modules_to_save": ["model.norm"]}, {}, AdapterUnsupportedError, "modules_to_save"),
        (False, {"modules_to_save": ["score"]}, {}, AdapterUnsupportedError, "modules_to_save"),
        (False, {}, spoilt(head=torch.ones(65, 32)), AdapterInvalidError, HEAD),
        (False, {}, spoilt(embedding=torch.ones(64, 31)), AdapterInvalidError, EMBEDDING),
        (False, {}, spoilt(head=torch.full((64, 32), torch.nan)), AdapterInvalidError, HEAD),
        (True, {}, spoilt(embedding=torch.ones(64, 32), head=torch.zeros(64, 32)), AdapterInvalidError, HEAD),
        (True, {"ensure_weight_tying": "x"}, spoilt(head=torch.ones(64, 32)), AdapterInvalidError, "ensure"),
        (
            False,
            {},
            {"base_model.model.lm_head.base_layer.weight": torch.ones(64, 32)},
            AdapterUnsupportedError,
            "lm_head.base_layer.weight",
        ),
        (
            False,
            {},
            {"base_model.model.model.norm.weight": torch.ones(32)},
            AdapterUnsupportedError,
            "model.norm.weight",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    tied: bool,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    error: type[AdapterError],
    subject: str,
    tmp_path: Path,
) -> None:
    own = lora_tensors(BASE, rank=4, sites=["q_proj"])
    write_adapter(tmp_path, lora_config(BASE, rank=4, sites=["q_proj"], **fields), own | tensors)
    with pytest.raises(error) as caught:
        read(tmp_path, replace(BASE, is_tied=tied))
    assert subject in caught.value.subject


def test_a_head_that_is_saved_and_adapted_is_refused(tmp_path: Path) -> None:
    tensors = {
        HEAD: torch.ones(64, 32),
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
        "base_model.model.lm_head.lora_B.weight": torch.ones(64, 4),
    }
    write_adapter(tmp_path, lora_config(BASE, rank=4, modules_to_save=["lm_head"]), tensors)
    with pytest.raises(AdapterInvalidError, match="also replaced by trained rows or weights") as caught:
        read(tmp_path, BASE)
    assert caught.value.subject == "lm_head"
