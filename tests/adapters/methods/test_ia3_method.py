from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file

from manyhats.adapters.equations import affine
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterNoEffectError,
    AdapterUnsupportedError,
    BaseMismatchError,
)
from manyhats.adapters.primitives import Affine, InputScale
from manyhats.adapters.sites import Site
from support.factories.adapters import make_base, make_ia3, write_adapter
from support.oracles.methods import ia3_input, ia3_output
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

BASE = make_base()
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"
CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "PEFT's own choice": {},
    "outputs alone": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "feedforward_modules": []},
    "inputs of parts of a fused linear": {
        "target_modules": ["q_proj", "gate_proj", "up_proj"],
        "feedforward_modules": ["q_proj", "gate_proj"],
    },
    "a regex": {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": r".*mlp\..*"},
    "a head as well": {
        "target_modules": ["v_proj"],
        "feedforward_modules": [],
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("family", PEFT_FAMILIES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    save_peft(make_peft(model, IA3Config(task_type="CAUSAL_LM", **config)), tmp_path)
    check_against_peft(model, tmp_path)


def test_fused_projections_are_split_by_their_parts(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    sites = ["q_proj", "gate_proj", "down_proj"]
    make_ia3(tmp_path, describe_model(model), sites=sites, feed_forward=["gate_proj"], layers=[1])
    lowered = check_against_peft(model, tmp_path)
    assert {delta.site.name for delta in lowered.deltas if isinstance(delta, InputScale)} == {
        "gate_proj",
        "up_proj",
    }
    assert {delta.site.name for delta in lowered.deltas if isinstance(delta, Affine)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "down_proj",
    }


def test_the_shape_says_what_is_rescaled(tmp_path: Path) -> None:
    make_ia3(tmp_path, BASE, layers=[1])
    k_proj, v_proj, down_proj = sorted(
        (delta for delta in read_lowered(tmp_path, BASE).deltas if isinstance(delta, Affine | InputScale)),
        key=lambda delta: "kvd".index(delta.site.name[0]),
    )
    assert isinstance(k_proj, Affine)
    assert k_proj.offset is None
    assert k_proj.scale is not None
    assert k_proj.scale.shape == (16,)
    assert isinstance(v_proj, Affine)
    assert isinstance(down_proj, InputScale)
    assert down_proj.site == Site(1, "down_proj")
    assert down_proj.scale.shape == (48,)


def test_equations() -> None:
    x, vector = torch.randn(3, 4), torch.randn(4)
    torch.testing.assert_close(ia3_output(x, vector), x @ torch.diag(vector))
    torch.testing.assert_close(ia3_input(x, vector), x @ torch.diag(vector))
    torch.testing.assert_close(affine(x, Affine(Site(0, "k_proj"), vector, None)), ia3_output(x, vector))


@pytest.mark.parametrize(
    ("fields", "error", "subject"),
    [
        ({"feedforward_modules": ["q_proj"]}, AdapterInvalidError, Q_PROJ),
        ({"feedforward_modules": 3}, AdapterInvalidError, "feedforward_modules"),
        ({"feedforward_modules": [3]}, AdapterInvalidError, "feedforward_modules"),
        ({"modules_to_save": ["norm"]}, AdapterUnsupportedError, "modules_to_save"),
        ({"surprise": 1}, AdapterUnsupportedError, "surprise"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(
    fields: dict[str, Any], error: type[AdapterError], subject: str, tmp_path: Path
) -> None:
    make_ia3(tmp_path, BASE, sites=["q_proj"], **fields)
    with pytest.raises(error) as caught:
        read(tmp_path, BASE)
    assert subject in caught.value.subject


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        (Q_PROJ, torch.ones(31, 1), AdapterInvalidError),
        (Q_PROJ, torch.ones(32), AdapterInvalidError),
        (Q_PROJ, torch.ones(()), AdapterInvalidError),
        (Q_PROJ, torch.ones(1, 32), AdapterInvalidError),  # feedforward_modules does not name it
        (Q_PROJ, torch.full((32, 1), torch.nan), AdapterInvalidError),
        (Q_PROJ.replace(".0.", ".7."), torch.ones(32, 1), AdapterInvalidError),
        (
            Q_PROJ.replace("model.layers.0.self_attn.q_proj", "lm_head"),
            torch.ones(64, 1),
            AdapterUnsupportedError,
        ),
        (Q_PROJ.replace("ia3_l", "lora_A.weight"), torch.ones(1, 32), AdapterInvalidError),
        (Q_PROJ.replace("ia3_l", "vera_lambda_b"), torch.ones(32), AdapterUnsupportedError),
    ],
)
def test_spoilt_tensors_are_refused(
    name: str, tensor: torch.Tensor, error: type[AdapterError], tmp_path: Path
) -> None:
    make_ia3(tmp_path, BASE, sites=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    write_adapter(tmp_path, config, tensors | {name: tensor})
    with pytest.raises(error) as caught:
        read(tmp_path, BASE)
    assert caught.value.subject == name


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    make_ia3(tmp_path, BASE, scale=0.0)
    with pytest.raises(AdapterNoEffectError):
        read(tmp_path, BASE)


def test_an_adapter_of_another_base_is_told_apart(tmp_path: Path) -> None:
    make_ia3(tmp_path, make_base(hidden_size=48, intermediate_size=80, num_heads=6, num_kv_heads=3, names=()))
    with pytest.raises(BaseMismatchError):
        read(tmp_path, BASE)
