"""How adapters begin: as their library begins them, by a seed, and changing nothing where the method allows that."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import load_file

from manyhats.engine.checkpoints.loader import Quantization
from manyhats.trainer.methods.making import default_learning_rate, make_adapter
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from support.factories.tiny_models import save_tokenizer
from support.factories.trainables import ALL_CASES, ALL_LINEARS, BOTTLENECK_CASES, PEFT_CASES, tiny_base
from support.oracles.peft import IDS, base_logits, make_peft, save_peft
from support.oracles.primitives import logits_with

pytestmark = pytest.mark.filterwarnings("ignore")

NEUTRAL = {
    name: ALL_CASES[name]
    for name in ("lora", "lora on the head", "dora", "ia3", "ia3 of outputs", *BOTTLENECK_CASES)
}
DRAWN = {name: case for name, case in ALL_CASES.items() if not name.startswith("ia3")}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("case", NEUTRAL.values(), ids=NEUTRAL.keys())
def test_a_fresh_adapter_changes_nothing(case: AdapterSettings, quantization: Quantization) -> None:
    base = tiny_base("qwen2", quantization)
    lowered = make_adapter(case, "task", base.model, seed=0).lowered()
    actual = logits_with(base.dense, lowered, IDS)
    torch.testing.assert_close(actual, base_logits(base.dense), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", DRAWN.values(), ids=DRAWN.keys())
def test_the_seed_decides_how_it_begins(case: AdapterSettings) -> None:
    model = tiny_base().model
    first, again, other = (make_adapter(case, "task", model, seed=seed).parameters for seed in (3, 3, 4))
    assert list(first) == list(again) == list(other)
    for name, parameter in first.items():
        torch.testing.assert_close(parameter, again[name], atol=0, rtol=0)
        assert parameter.dtype is torch.float32
        assert parameter.requires_grad
    assert any(not torch.equal(parameter, other[name]) for name, parameter in first.items())


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_the_global_generator_is_left_alone(case: AdapterSettings) -> None:
    before = torch.get_rng_state()
    make_adapter(case, "task", tiny_base().model, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_of_lora_is_spread_as_peft_s() -> None:
    case = LoraSettings(rank=64, target_modules=("down_proj",))
    parameters = make_adapter(case, "task", tiny_base().model, seed=0).parameters
    theirs = make_peft(tiny_base().dense, LoraConfig(r=64, target_modules=["down_proj"]), size=0)
    for name, reference in theirs.named_parameters():
        if "lora_" not in name:
            continue
        ours = parameters[name.replace(".default", "")]
        assert ours.shape == reference.shape
        torch.testing.assert_close(ours.std(), reference.std(), rtol=0.05, atol=0)
        torch.testing.assert_close(ours.abs().max(), reference.abs().max(), rtol=0.05, atol=0)


@pytest.mark.parametrize(("family", "quantization"), [("qwen2", "nf4"), ("llama", "none"), ("phi3", "none")])
def test_magnitudes_of_dora_are_peft_s(family: str, quantization: Quantization) -> None:
    base = tiny_base(family, quantization)
    case = LoraSettings(rank=4, use_dora=True, target_modules=ALL_LINEARS)
    parameters = make_adapter(case, "task", base.model, seed=0).parameters
    config = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = make_peft(base.dense, config, size=0)
    magnitudes = {
        name.replace(".default.weight", ""): parameter
        for name, parameter in theirs.named_parameters()
        if "magnitude" in name
    }
    assert magnitudes.keys() == {name for name in parameters if "magnitude" in name}
    for name, magnitude in magnitudes.items():
        torch.testing.assert_close(parameters[name], magnitude, atol=0, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@pytest.mark.parametrize("text", ["the hat and the other", "a"])
def test_a_prompt_begun_as_text_is_peft_s(family: str, text: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    base = tiny_base(family)
    config = PromptTuningConfig(
        num_virtual_tokens=6,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tmp_path),
        task_type="CAUSAL_LM",
    )
    theirs = make_peft(base.dense, config, size=0).prompt_encoder["default"].embedding.weight
    case = PromptSettings(num_virtual_tokens=6, init="text", init_text=text)
    adapter = make_adapter(case, "task", base.model, seed=0)
    torch.testing.assert_close(adapter.parameters["prompt_embeddings"], theirs, atol=0, rtol=1e-6)
    assert adapter.config["prompt_tuning_init"] == "TEXT"
    assert adapter.config["prompt_tuning_init_text"] == text


def test_a_prompt_begun_as_vocabulary_is_rows_of_the_embedding() -> None:
    model = tiny_base().model
    case = PromptSettings(num_virtual_tokens=6, init="vocabulary")
    rows = make_adapter(case, "task", model, seed=0).parameters["prompt_embeddings"]
    distances = torch.cdist(rows.detach(), model.weights.embedding)
    assert distances.min(dim=1).values.max() < 1e-3


def test_random_beginnings_are_standard_normal_as_peft_s() -> None:
    model = tiny_base().model
    for case in (
        PromptSettings(num_virtual_tokens=100, init="random"),
        PrefixSettings(num_virtual_tokens=100, projection_size=0),
    ):
        values = make_adapter(case, "task", model, seed=0).parameters["prompt_embeddings"]
        assert abs(float(values.mean())) < 0.05
        assert abs(float(values.std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (
            PrefixSettings(num_virtual_tokens=5, projection_size=7),
            PrefixTuningConfig(
                num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7, task_type="CAUSAL_LM"
            ),
        ),
        (
            PTuningSettings(num_virtual_tokens=5, encoder_size=7),
            PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=7, task_type="CAUSAL_LM"),
        ),
    ],
    ids=["prefix", "p-tuning"],
)
def test_encoders_with_peft_s_weights_put_out_what_peft_saves(
    case: AdapterSettings, config: PrefixTuningConfig | PromptEncoderConfig, tmp_path: Path
) -> None:
    base = tiny_base()
    adapter = make_adapter(case, "task", base.model, seed=0)
    peft = make_peft(base.dense, config)
    theirs = dict(peft.prompt_encoder["default"].named_parameters())
    assert {name: value.shape for name, value in theirs.items()} == {
        name: value.shape for name, value in adapter.parameters.items()
    }
    for name, parameter in adapter.parameters.items():
        parameter.data.copy_(theirs[name].data)
    save_peft(peft, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    made = adapter.artifact().tensors["prompt_embeddings"]
    torch.testing.assert_close(made, saved, atol=1e-6, rtol=1e-6)


def test_linears_of_encoders_are_spread_as_torch_s() -> None:
    case = PTuningSettings(num_virtual_tokens=5, encoder_size=80)
    parameters = make_adapter(case, "task", tiny_base().model, seed=0).parameters
    for name, parameter in parameters.items():
        if name.startswith("mlp_head"):
            bound = parameters[name.replace("bias", "weight")].shape[1] ** -0.5
            assert 0.8 * bound < float(parameter.abs().max()) <= bound
            assert abs(float(parameter.std()) - bound / math.sqrt(3)) < 0.15 * bound


def test_b_learns_faster_with_lora_plus() -> None:
    for use_dora in (False, True):
        case = LoraSettings(rank=2, target_modules=("q_proj",), lora_plus_ratio=16, use_dora=use_dora)
        adapter = make_adapter(case, "task", tiny_base().model, seed=0)
        scales = {
            name.rpartition("q_proj.")[2]: adapter.learning_rate_scale(name) for name in adapter.parameters
        }
        assert scales.pop("lora_B.weight") == 16
        assert set(scales.values()) == {1.0}


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_every_method_has_a_learning_rate(case: AdapterSettings) -> None:
    assert 1e-5 < default_learning_rate(case) < 0.1


def test_the_rates_of_lora_plus_lie_around_lora_s() -> None:
    plain, plus = (default_learning_rate(LoraSettings(lora_plus_ratio=ratio)) for ratio in (1, 16))
    assert plus == pytest.approx(plain / 4)


def test_dropout_is_the_setting_s() -> None:
    case = LoraSettings(rank=2, target_modules=("q_proj",), dropout=0.25)
    adapter = make_adapter(case, "task", tiny_base().model, seed=0)
    assert adapter.dropout == 0.25
    assert adapter.config["lora_dropout"] == 0.25
    assert make_adapter(PEFT_CASES["ia3"], "task", tiny_base().model, seed=0).dropout == 0


def test_parameters_can_lie_on_another_device() -> None:
    adapter = make_adapter(PEFT_CASES["lora"], "task", tiny_base().model, seed=0, device=torch.device("meta"))
    assert {parameter.device.type for parameter in adapter.parameters.values()} == {"meta"}
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())


def test_bottlenecks_of_one_task_and_another_begin_alike() -> None:
    model = tiny_base().model
    case = BottleneckSettings(reduction_factor=16)
    one, other = (make_adapter(case, task, model, seed=1) for task in ("one", "other"))
    for a, b in zip(one.parameters.values(), other.parameters.values(), strict=True):
        assert torch.equal(a, b)
    assert one.config == replace(one, config={**other.config, "name": "one"}).config
