"""Training goes on from an artifact, whoever made it, if it is what the settings make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.methods.warm_start import load_tensors
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from support.factories.trainables import ALL_CASES, BOTTLENECK_CASES, PEFT_CASES, move, save, tiny_base
from support.oracles.peft import IDS, make_peft, peft_logits, save_peft
from support.oracles.primitives import logits_with

pytestmark = pytest.mark.filterwarnings("ignore")

RESUMABLE = {name: case for name, case in ALL_CASES.items() if name not in ("projected prefix", "p-tuning")}

FROM_PEFT: dict[str, tuple[AdapterSettings, Any]] = {
    "lora": (
        LoraSettings(rank=3, alpha=5, target_modules=("q_proj", "up_proj")),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    ),
    "lora on the head": (
        LoraSettings(rank=3, alpha=5, target_modules=("q_proj", "lm_head")),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    ),
    "dora": (
        LoraSettings(rank=3, alpha=5, use_dora=True, target_modules=("q_proj",)),
        LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ),
    "ia3": (
        Ia3Settings(),
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
    ),
    "prefix": (
        PrefixSettings(num_virtual_tokens=3, projection_size=0),
        PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, task_type="CAUSAL_LM"),
    ),
    "prompt": (
        PromptSettings(num_virtual_tokens=3),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", RESUMABLE.values(), ids=RESUMABLE.keys())
def test_an_adapter_goes_on_from_its_own_artifact(
    case: AdapterSettings, save_dtype: str, tmp_path: Path
) -> None:
    model = tiny_base().model
    first = make_adapter(case, "first", model, seed=0)
    move(first)
    directory = save(first, tmp_path, save_dtype)
    second = make_adapter(case, "second.try", model, seed=1, init_from=directory)
    tolerance = 0.0 if save_dtype == "float32" else 2.0**-8
    pairs = zip(first.parameters.values(), second.parameters.values(), strict=True)
    for before, after in pairs:
        assert after.dtype is torch.float32
        torch.testing.assert_close(after, before, atol=0, rtol=tolerance)


@pytest.mark.parametrize(("case", "config"), FROM_PEFT.values(), ids=FROM_PEFT.keys())
def test_it_goes_on_from_what_peft_trained(case: AdapterSettings, config: Any, tmp_path: Path) -> None:
    base = tiny_base()
    save_peft(make_peft(base.dense, config), tmp_path)
    adapter = make_adapter(case, "task", base.model, seed=0, init_from=str(tmp_path))
    expected = peft_logits(base.dense, tmp_path)[-len(IDS) :]
    actual = logits_with(base.dense, adapter.lowered(), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_prompt_tuning_goes_on_from_p_tuning(tmp_path: Path) -> None:
    model = tiny_base().model
    first = make_adapter(PEFT_CASES["p-tuning"], "task", model, seed=0)
    case = PromptSettings(num_virtual_tokens=4)
    second = make_adapter(case, "task", model, seed=0, init_from=save(first, tmp_path))
    embeddings = first.artifact().tensors["prompt_embeddings"]
    torch.testing.assert_close(second.parameters["prompt_embeddings"], embeddings, atol=0, rtol=0)


REFUSED: dict[str, tuple[AdapterSettings, AdapterSettings, str]] = {
    "projection": (
        PEFT_CASES["projected prefix"],
        PEFT_CASES["projected prefix"],
        "set projection_size to 0",
    ),
    "encoder": (PEFT_CASES["p-tuning"], PEFT_CASES["p-tuning"], "train prompt tuning from it"),
    "rank": (
        LoraSettings(rank=2, target_modules=("q_proj",)),
        LoraSettings(rank=4, target_modules=("q_proj",)),
        "has shape [2, 64]; these settings make [4, 64]",
    ),
    "fewer modules": (
        LoraSettings(rank=2, target_modules=("q_proj",)),
        LoraSettings(rank=2, target_modules=("q_proj", "k_proj")),
        "lacks base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
    ),
    "more modules": (
        LoraSettings(rank=2, target_modules=("q_proj", "k_proj")),
        LoraSettings(rank=2, target_modules=("q_proj",)),
        "k_proj.lora_A.weight, which these settings do not make",
    ),
    "alpha": (
        LoraSettings(rank=2, alpha=4, target_modules=("q_proj",)),
        LoraSettings(rank=2, alpha=6, target_modules=("q_proj",)),
        "layer 0 q_proj: scale is 2.0 there, and 3.0 by these settings",
    ),
    "scaling of dora": (
        LoraSettings(rank=2, alpha=4, target_modules=("q_proj",), use_dora=True),
        LoraSettings(rank=2, alpha=4, target_modules=("q_proj",), use_dora=True, use_rslora=True),
        "layer 0 q_proj: scale is",
    ),
    "another method": (
        LoraSettings(rank=2, target_modules=("q_proj",), use_dora=True),
        LoraSettings(rank=2, target_modules=("q_proj",)),
        "is dora, but lora is being trained",
    ),
    "activation": (
        BottleneckSettings(reduction_factor=16),
        BottleneckSettings(reduction_factor=16, non_linearity="tanh"),
        "layer 0 feed_forward: activation is relu there, and tanh by these settings",
    ),
    "scaling": (
        BottleneckSettings(reduction_factor=16),
        BottleneckSettings(reduction_factor=16, scaling=2.0),
        "layer 0 feed_forward: scale is 1, … there, and 2, … by these settings",
    ),
    "variant": (
        BottleneckSettings(reduction_factor=16),
        BottleneckSettings(reduction_factor=16, variant="parallel", scaling=1.0),
        "layer 0 feed_forward: input is",
    ),
    "virtual tokens": (
        PromptSettings(num_virtual_tokens=3),
        PromptSettings(num_virtual_tokens=4),
        "prompt_embeddings has shape [3, 64]; these settings make [4, 64]",
    ),
    "prefix for a prompt": (
        PrefixSettings(num_virtual_tokens=4, projection_size=0),
        PromptSettings(num_virtual_tokens=4),
        "is prefix tuning, but prompt tuning is being trained",
    ),
}


@pytest.mark.parametrize(("saved", "wanted", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_an_artifact_of_other_settings_is_refused(
    saved: AdapterSettings, wanted: AdapterSettings, text: str, tmp_path: Path
) -> None:
    model = tiny_base().model
    adapter = make_adapter(saved, "task", model, seed=0)
    move(adapter)
    directory = save(adapter, tmp_path)
    with pytest.raises(SettingError) as caught:
        make_adapter(wanted, "task", model, seed=0, init_from=directory)
    assert caught.value.setting == "init_from"
    assert text in str(caught.value)
    assert str(caught.value).count(str(directory)) <= 1


def test_an_artifact_of_another_base_is_refused(tmp_path: Path) -> None:
    model = tiny_base().model
    named = replace(model, reference="org/other")
    adapter = make_adapter(PEFT_CASES["lora"], "task", named, seed=0)
    move(adapter)
    with pytest.raises(SettingError, match=r"init_from: .*was made for 'org/other'"):
        make_adapter(PEFT_CASES["lora"], "task", model, seed=0, init_from=save(adapter, tmp_path))


def test_a_directory_without_an_artifact_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SettingError, match="init_from"):
            make_adapter(PEFT_CASES["lora"], "task", tiny_base().model, seed=0, init_from=directory)


def test_tensors_are_refused_by_an_encoder() -> None:
    adapter = make_adapter(PTuningSettings(), "task", tiny_base().model, seed=0)
    with pytest.raises(SettingError, match="encoder's output"):
        load_tensors(adapter, {"prompt_embeddings": torch.zeros(16, 64)})


def test_nothing_is_loaded_of_tensors_that_do_not_fit() -> None:
    adapter = make_adapter(BOTTLENECK_CASES["seq"], "task", tiny_base().model, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}
    tensors = {name: torch.ones_like(value) for name, value in before.items()}
    tensors.popitem()
    with pytest.raises(SettingError, match="lacks"):
        load_tensors(adapter, tensors)
    for name, value in before.items():
        assert torch.equal(adapter.parameters[name], value)
