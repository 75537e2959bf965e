from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.equations import affine, low_rank
from manyhats.adapters.errors import AdapterError, AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.methods.dora import dora_gain, updated_lengths
from manyhats.adapters.primitives import Affine, LowRank
from manyhats.adapters.sites import Site
from support.factories.adapters import make_base, make_dora
from support.oracles.methods import dora_output
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

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "all linears": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
}


def make(model: Any, directory: Path, **config: Any) -> Path:
    peft = make_peft(model, LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, **config))
    return save_peft(peft, directory)


def spoil(directory: Path, part: str, change: Any) -> None:
    """Change, or with None remove, every tensor whose name holds ``part``."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if part in name]:
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize("family", [*PEFT_FAMILIES, "phi3"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    if family == "phi3":
        config = config | {"target_modules": ["qkv_proj", "down_proj", "gate_up_proj"]}
    check_against_peft(model, make(model, tmp_path, **config))


def test_each_linear_is_rescaled_then_updated(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    base = describe_model(model)
    make(model, tmp_path, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    assert read(tmp_path, base).method is AdapterMethod.DORA
    deltas = read_lowered(tmp_path, base).deltas
    assert [(type(delta), delta.site) for delta in deltas if isinstance(delta, Affine | LowRank)] == [
        (Affine, Site(1, "q_proj")),
        (LowRank, Site(1, "q_proj")),
        (Affine, Site(1, "up_proj")),
        (LowRank, Site(1, "up_proj")),
    ]
    q_proj, up_proj = deltas[0], deltas[2]
    assert isinstance(q_proj, Affine)
    assert isinstance(up_proj, Affine)
    assert q_proj.offset is not None  # of its bias, which keeps its length
    assert up_proj.offset is None


def test_the_output_is_a_linear_of_the_rescaled_rows() -> None:
    x, weight, a, b, bias = (torch.randn(shape) for shape in ((5, 6), (4, 6), (2, 6), (4, 2), (4,)))
    magnitude = torch.rand(4) + 0.5
    gain = dora_gain(magnitude, updated_lengths(weight, a, b, 0.7))
    updated = weight + 0.7 * b @ a
    torch.testing.assert_close((gain.unsqueeze(1) * updated).norm(dim=1), magnitude)
    actual = dora_output(x @ weight.T + bias, x, a, b, 0.7, gain, bias)
    torch.testing.assert_close(actual, x @ (gain.unsqueeze(1) * updated).T + bias)


def test_affine_and_low_rank_are_the_output_of_the_file_s_tensors(tmp_path: Path) -> None:
    base = describe_model(tiny_model("qwen2"))  # whose queries have a bias
    make_dora(tmp_path, base, sites=["q_proj"], layers=[1], rank=4, alpha=8)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora"
    a, b = tensors[f"{name}_A.weight"], tensors[f"{name}_B.weight"]
    rescaling, update = read_lowered(tmp_path, base).deltas
    assert isinstance(rescaling, Affine)
    assert isinstance(update, LowRank)
    assert base.weights is not None
    weight, bias = base.weights.linear(rescaling.site)
    assert bias is not None
    scale = 8 / 4
    gain = dora_gain(tensors[f"{name}_magnitude_vector"], updated_lengths(weight, a, b, scale))
    x = torch.randn(5, weight.shape[1])
    y = x @ weight.T + bias
    found = affine(y, rescaling) + low_rank(x, update.a, update.b, update.scale)
    torch.testing.assert_close(found, dora_output(y, x, a, b, scale, gain, bias))


def test_it_cannot_be_lowered_without_the_base_s_weights(tmp_path: Path) -> None:
    make_dora(tmp_path, make_base())
    with pytest.raises(AdapterUnsupportedError, match="weights") as caught:
        read(tmp_path, make_base())
    assert caught.value.subject == "use_dora"


def test_directories_of_the_factory_are_served(tmp_path: Path) -> None:
    base = describe_model(tiny_model())
    make_dora(tmp_path, base, sites=["q_proj"], layers=[0])
    assert len(read_lowered(tmp_path, base).deltas) == 2


@pytest.mark.parametrize(
    ("part", "change", "error", "text"),
    [
        ("0.self_attn.q_proj.lora_magnitude", lambda t: None, AdapterInvalidError, "partner"),
        ("0.self_attn.q_proj.lora_magnitude", lambda t: t[:-1], AdapterInvalidError, "expected [32]"),
        ("0.self_attn.q_proj.lora_magnitude", lambda t: t[:, None], AdapterInvalidError, "expected [32]"),
        ("0.self_attn.q_proj.lora_magnitude", lambda t: t * torch.nan, AdapterInvalidError, "not finite"),
        ("0.self_attn.q_proj.lora_A", lambda t: t * 1e38, AdapterInvalidError, "not finite"),
    ],
)
def test_spoilt_directories_are_refused(
    part: str, change: Any, error: type[AdapterError], text: str, tmp_path: Path
) -> None:
    base = describe_model(tiny_model())
    make_dora(tmp_path, base, sites=["q_proj"])
    spoil(tmp_path, part, change)
    with pytest.raises(error) as caught:
        read(tmp_path, base)
    assert "q_proj.lora_" in caught.value.subject
    assert text in str(caught.value)


def test_a_row_without_length_has_no_direction(tmp_path: Path) -> None:
    model = tiny_model()
    make_dora(tmp_path, describe_model(model), sites=["q_proj"])
    spoil(tmp_path, "lora_B", torch.zeros_like)
    model.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    with pytest.raises(AdapterInvalidError, match="not finite"):
        read(tmp_path, describe_model(model))
