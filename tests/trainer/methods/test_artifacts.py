"""What training would save: the store serves it, and the library that it is for loads it and computes the same."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.trainer.errors import OutputError, SettingError
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from support.factories.tiny_models import make_checkpoint
from support.factories.trainables import (
    ALL_CASES,
    ALL_LINEARS,
    BOTTLENECK_CASES,
    PEFT_CASES,
    TinyBase,
    move,
    save,
    tiny_base,
)
from support.harnesses.engine import load_tiny
from support.oracles.golden import ADAPTERHUB_FIXTURES, GOLDEN, needs_golden
from support.oracles.peft import IDS, base_logits, make_peft, peft_logits, save_peft
from support.oracles.primitives import logits_with

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("llama", "qwen2", "phi3", "gemma3_text", "granite")


def read(directory: Path, model: LoadedModel) -> LoweredAdapter:
    """As a registration reads it."""
    with open_source(str(directory), [directory]) as source:
        return read_adapter(source, model.description, AdapterLimits()).lowered


def served_by_peft(base: TinyBase, directory: Path) -> torch.Tensor:
    """PEFT's logits of the real tokens; it gives rows for virtual ones too."""
    return peft_logits(base.dense, directory)[-len(IDS) :]


def trained(case: AdapterSettings, base: TinyBase) -> Any:
    adapter = make_adapter(case, "task", base.model, seed=0)
    move(adapter)
    return adapter


def assert_same(ours: Any, theirs: Any) -> None:
    """Primitives equal in every number; the digest apart, which files alone have."""
    if is_dataclass(ours):
        assert type(ours) is type(theirs)
        for field in fields(ours):
            if field.name != "digest":
                assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours.detach().float(), theirs.float(), atol=0, rtol=0)
    else:
        assert ours == theirs


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_what_is_trained_is_what_the_store_reads(case: AdapterSettings, tmp_path: Path) -> None:
    base = tiny_base()
    adapter = trained(case, base)
    assert_same(adapter.lowered(), read(save(adapter, tmp_path), base.model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", PEFT_CASES.values(), ids=PEFT_CASES.keys())
def test_peft_computes_the_same(family: str, case: AdapterSettings, tmp_path: Path) -> None:
    base = tiny_base(family)
    adapter = trained(case, base)
    expected = served_by_peft(base, save(adapter, tmp_path))
    assert (expected - base_logits(base.dense)).abs().max() > 1e-2
    actual = logits_with(base.dense, adapter.lowered(), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["lora", "dora", "projected prefix"])
def test_peft_computes_the_same_over_an_nf4_base(case: str, tmp_path: Path) -> None:
    base = tiny_base("llama", "nf4")
    adapter = trained(PEFT_CASES[case], base)
    expected = served_by_peft(base, save(adapter, tmp_path))
    actual = logits_with(base.dense, adapter.lowered(), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_peft_computes_the_same_with_lora_on_a_tied_head(tmp_path: Path) -> None:
    base = tiny_base(tie=True)
    adapter = trained(PEFT_CASES["lora on the head"], base)
    expected = served_by_peft(base, save(adapter, tmp_path))
    actual = logits_with(base.dense, adapter.lowered(), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_lora_gives_peft_s_logits(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Alphas are moderate: attention scores grow with their square, and with them what rounding does to a softmax."""
    base = tiny_base()
    modules = data.draw(st.lists(st.sampled_from([*ALL_LINEARS, "lm_head"]), min_size=1, unique=True))
    patterned = data.draw(st.lists(st.sampled_from(modules), unique=True))
    case = LoraSettings(
        rank=data.draw(st.integers(1, 9)),
        alpha=data.draw(st.floats(0.5, 4)),
        target_modules=tuple(modules),
        use_rslora=data.draw(st.booleans()),
        use_dora="lm_head" not in modules and data.draw(st.booleans()),
        rank_pattern={name: data.draw(st.integers(1, 9)) for name in patterned},
        alpha_pattern={name: data.draw(st.floats(0.5, 4)) for name in patterned},
    )
    adapter = trained(case, base)
    directory = save(adapter, tmp_path_factory.mktemp("lora"))
    actual = logits_with(base.dense, read(directory, base.model), IDS)
    torch.testing.assert_close(actual, served_by_peft(base, directory), atol=1e-4, rtol=1e-4)


PEFT_CONFIGS: dict[str, tuple[AdapterSettings, Any]] = {
    "lora": (
        LoraSettings(
            rank=4, alpha=8, dropout=0.1, target_modules=("v_proj", "q_proj"), alpha_pattern={"q_proj": 2.5}
        ),
        LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.1,
            target_modules=["q_proj", "v_proj"],
            alpha_pattern={"q_proj": 2.5},
            task_type="CAUSAL_LM",
        ),
    ),
    "dora": (
        LoraSettings(rank=4, alpha=0.5, use_dora=True, use_rslora=True, target_modules=("o_proj",)),
        LoraConfig(
            r=4,
            lora_alpha=0.5,  # type: ignore[arg-type]
            use_dora=True,
            use_rslora=True,
            target_modules=["o_proj"],
            task_type="CAUSAL_LM",
        ),
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
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "projected prefix": (
        PrefixSettings(num_virtual_tokens=3, projection_size=9),
        PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=9, task_type="CAUSAL_LM"
        ),
    ),
    "prompt": (
        PromptSettings(num_virtual_tokens=3, init="vocabulary"),
        PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"),
    ),
    "p-tuning": (
        PTuningSettings(num_virtual_tokens=3, encoder_size=9),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=9, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("case", "config"), PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
def test_files_are_those_that_peft_saves(
    family: str, case: AdapterSettings, config: Any, tmp_path: Path
) -> None:
    base = tiny_base(family)
    save_peft(make_peft(base.dense, config), tmp_path, save_embedding_layers=False)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    files = make_adapter(case, "task", base.model, seed=0).files("float32")
    ours = json.loads(files["adapter_config.json"])
    theirs["base_model_name_or_path"] = base.model.reference
    for field in ("target_modules", "feedforward_modules"):
        if field in theirs:
            theirs[field] = sorted(theirs[field])
    assert ours == theirs
    saved = load((tmp_path / "adapter_model.safetensors").read_bytes())
    made = load(files["adapter_model.safetensors"])
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in saved.items()
    }


def test_an_artifact_names_its_base_as_other_libraries_load_it() -> None:
    named = replace(tiny_base().model, reference="org/base")
    for case, key in (("lora", "base_model_name_or_path"), ("prompt", "base_model_name_or_path")):
        assert make_adapter(PEFT_CASES[case], "task", named, seed=0).config[key] == "org/base"
    bottleneck = make_adapter(BOTTLENECK_CASES["seq"], "task", named, seed=0)
    assert bottleneck.config["model_name"] == "org/base"
    assert bottleneck.artifact().base_model == "org/base"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_bottlenecks_are_laid_out_as_adapterhub_s(family: str) -> None:
    case = BottleneckSettings(variant="double_seq", reduction_factor=16)
    files = make_adapter(case, "my.task", tiny_base(family).model, seed=0).files("float32")
    assert sorted(files) == ["adapter.safetensors", "adapter_config.json"]
    expected = {
        f"model.layers.{layer}.{place}.adapters.my_task.{part}": shape
        for layer in (0, 1)
        for place in ("attention_adapters", "output_adapters")
        for part, shape in {
            "adapter_down.0.weight": (4, 64),
            "adapter_down.0.bias": (4,),
            "adapter_up.weight": (64, 4),
            "adapter_up.bias": (64,),
        }.items()
    }
    tensors = load(files["adapter.safetensors"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    config = json.loads(files["adapter_config.json"])
    assert config["name"] == "my_task"
    assert config["model_type"] == family
    assert config["model_class"].lower() == f"{family}forcausallm"


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_bottlenecks_lie_where_the_family_s_layers_do(family: str, tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "model", family))
    files = make_adapter(BottleneckSettings(variant="double_seq"), "task", model, seed=0).files("float32")
    names = {name.partition(".adapters.")[0] for name in load(files["adapter.safetensors"])}
    places = ("attention_adapters", "output_adapters")
    assert names == {f"transformer.h.{layer}.{place}" for layer in (0, 1) for place in places}


@pytest.mark.parametrize("task", ["type", "keys", "training"])
def test_a_task_named_as_an_attribute_of_a_module_can_be_loaded_by_adapterhub(task: str) -> None:
    config = make_adapter(BOTTLENECK_CASES["seq"], task, tiny_base().model, seed=0).config
    torch.nn.ModuleDict({config["name"]: torch.nn.Identity()})


GOLDEN_SETTINGS = {
    "adapterhub_seq_bn": BottleneckSettings(variant="seq", reduction_factor=64),
    "adapterhub_double_seq_bn": BottleneckSettings(
        variant="double_seq", reduction_factor=128, non_linearity="swish"
    ),
    "adapterhub_par_bn": BottleneckSettings(variant="parallel", reduction_factor=64),
}


@needs_golden
@pytest.mark.real_model
@pytest.mark.parametrize(("fixture", "case"), GOLDEN_SETTINGS.items())
def test_bottlenecks_are_laid_out_as_the_golden_ones(fixture: str, case: BottleneckSettings) -> None:
    assert ADAPTERHUB_FIXTURES[fixture] is AdapterMethod.BOTTLENECK
    model = load_model("smollm2-135m-instruct", quantization="nf4", dtype=torch.float32)
    golden = GOLDEN / fixture / "adapter"
    theirs = json.loads((golden / "adapter_config.json").read_text())
    adapter = make_adapter(case, theirs["name"], model, seed=0)
    files = adapter.files("float32")
    ours = json.loads(files["adapter_config.json"])
    # How it began: that its U does not begin as zeros is the fixtures' way of having an effect.
    theirs["config"]["init_weights"] = ours["config"]["init_weights"]
    assert ours == theirs
    saved = load((golden / "adapter.safetensors").read_bytes())
    made = load(files["adapter.safetensors"])
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in saved.items()
    }
    going_on = make_adapter(case, "another.task", model, seed=0, init_from=golden)
    assert_same(going_on.lowered(), read(golden, model))


def test_bfloat16_is_for_matrices_only() -> None:
    base = tiny_base()
    dora = load(trained(PEFT_CASES["dora"], base).files("bfloat16")["adapter_model.safetensors"])
    for name, tensor in dora.items():
        assert tensor.dtype is (torch.float32 if "magnitude" in name else torch.bfloat16)
    ia3 = load(trained(PEFT_CASES["ia3"], base).files("bfloat16")["adapter_model.safetensors"])
    assert {tensor.dtype for tensor in ia3.values()} == {torch.float32}


def test_the_same_adapter_gives_the_same_bytes() -> None:
    adapter = trained(PEFT_CASES["lora"], tiny_base())
    assert adapter.files("float32") == adapter.files("float32")


def test_values_that_are_not_finite_are_not_written() -> None:
    adapter = make_adapter(PEFT_CASES["lora"], "task", tiny_base().model, seed=0)
    name = next(iter(adapter.parameters))
    adapter.parameters[name].data[0, 0] = torch.nan
    with pytest.raises(OutputError, match=name):
        adapter.files("float32")


def test_an_unknown_dtype_is_refused() -> None:
    adapter = make_adapter(PEFT_CASES["lora"], "task", tiny_base().model, seed=0)
    with pytest.raises(SettingError, match="float16") as caught:
        adapter.files("float16")
    assert caught.value.setting == "save_dtype"
