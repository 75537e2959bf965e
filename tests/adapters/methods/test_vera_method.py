from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import VeraConfig
from peft.tuners.vera.model import _kaiming_init
from safetensors.torch import load_file

from manyhats.adapters.equations import low_rank
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.methods.vera import vera_projections
from manyhats.adapters.primitives import LowRank
from support.factories.adapters import make_base, make_vera, write_adapter
from support.oracles.methods import vera_delta
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
CONFIGS: dict[str, dict[str, Any]] = {
    "saved": {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "drawn from its key": {
        "r": 8,
        "target_modules": ["q_proj", "down_proj"],
        "save_projection": False,
        "projection_prng_key": 91,
    },
    "one layer": {
        "r": 5,
        "target_modules": ["up_proj"],
        "layers_to_transform": [0],
        "save_projection": False,
    },
    "head": {"r": 5, "target_modules": ["q_proj", "lm_head"], "save_projection": False},
}


@pytest.mark.parametrize("family", PEFT_FAMILIES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    peft = make_peft(model, VeraConfig(task_type="CAUSAL_LM", **config), size=1.0)
    save_peft(peft, tmp_path)
    check_against_peft(model, tmp_path)


def test_fused_projections_are_split_by_their_parts(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    make_vera(tmp_path, describe_model(model), sites=["q_proj", "up_proj"], scale=1.0)
    check_against_peft(model, tmp_path)


def test_all_linears_share_the_memory_of_one_a(tmp_path: Path) -> None:
    make_vera(tmp_path, BASE)
    deltas = [delta for delta in read_lowered(tmp_path, BASE).deltas if isinstance(delta, LowRank)]
    assert len(deltas) == 14
    assert len({delta.a.untyped_storage().data_ptr() for delta in deltas}) == 1


@given(st.integers(0, 2**63 - 1), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40))
def test_projections_are_drawn_as_peft_draws_them(key: int, rank: int, d_in: int, d_out: int) -> None:
    generator = torch.Generator().manual_seed(key)
    a, b = vera_projections(rank, d_in, d_out, key)
    assert torch.equal(a, _kaiming_init((rank, d_in), generator))
    assert torch.equal(b, _kaiming_init((d_out, rank), generator))


def test_projections_of_a_key_never_change() -> None:
    """Numbers of torch 2.13.0; an adapter that relies on its key would change with them."""
    a, b = vera_projections(3, 4, 2, key=42)
    assert a.flatten()[:3].tolist() == [0.9363646507263184, 1.0165479183197021, -0.2869240343570709]
    assert b.flatten()[-3:].tolist() == [-0.19967423379421234, 1.090197205543518, 0.20903335511684418]


def test_the_low_rank_delta_is_that_of_the_file_s_tensors(tmp_path: Path) -> None:
    make_vera(tmp_path, BASE, sites=["q_proj"], scale=1.0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    for delta in read_lowered(tmp_path, BASE).deltas:
        assert isinstance(delta, LowRank)
        name = f"base_model.model.model.layers.{delta.site.layer}.self_attn.q_proj.vera_lambda"
        x = torch.randn(5, 32)
        expected = vera_delta(x, a, b, tensors[f"{name}_d"], tensors[f"{name}_b"])
        torch.testing.assert_close(low_rank(x, delta.a, delta.b, delta.scale), expected)


def test_vectors_rescale_the_shared_projections() -> None:
    x, a, b, d, e = (torch.randn(shape) for shape in ((5, 4), (3, 7), (9, 3), (3,), (6,)))
    weight = torch.diag(e) @ b[:6] @ torch.diag(d) @ a[:, :4]
    torch.testing.assert_close(vera_delta(x, a, b, d, e), x @ weight.T)


@pytest.mark.parametrize(
    ("fields", "error", "subject"),
    [
        ({"r": 17}, AdapterInvalidError, "vera_lambda_d"),
        ({"r": 0}, AdapterInvalidError, "r"),
        ({"r": 300}, AdapterTooLargeError, "r"),
        ({"save_projection": "yes"}, AdapterInvalidError, "save_projection"),
        ({"save_projection": False}, AdapterInvalidError, "base_model.vera_A"),
        ({"projection_prng_key": -1}, AdapterInvalidError, "projection_prng_key"),
        ({"projection_prng_key": 2**63}, AdapterInvalidError, "projection_prng_key"),
        ({"projection_prng_key": 0.5}, AdapterInvalidError, "projection_prng_key"),
        ({"bias": "lora_only"}, AdapterInvalidError, "bias"),
        ({"trainable_token_indices": [1]}, AdapterUnsupportedError, "trainable_token_indices"),
        ({"surprise": 1}, AdapterUnsupportedError, "surprise"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(
    fields: dict[str, Any], error: type[AdapterError], subject: str, tmp_path: Path
) -> None:
    make_vera(tmp_path, BASE, sites=["q_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(error) as caught:
        read(tmp_path, BASE)
    assert subject in caught.value.subject


@pytest.mark.parametrize(
    ("name", "tensor", "subject"),
    [
        ("base_model.vera_A", None, "save_projection"),
        ("base_model.vera_B", None, "save_projection"),
        ("base_model.vera_A", torch.ones(16, 31), "vera_A"),
        ("base_model.vera_B", torch.ones(33, 16), "vera_B"),
        ("base_model.vera_A", torch.full((16, 32), torch.inf), "vera_A"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b", None, "vera_lambda_d"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b", torch.ones(31), "vera_lambda_b"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b",
            torch.full((32,), 3e38),
            "lambda_b",
        ),
    ],
)
def test_spoilt_tensors_are_refused(
    name: str, tensor: torch.Tensor | None, subject: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    make_vera(tmp_path, BASE, sites=["q_proj"], scale=40.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[name]
    write_adapter(tmp_path, config, tensors if tensor is None else tensors | {name: tensor})
    with pytest.raises(AdapterInvalidError) as caught:
        read(tmp_path, BASE)
    assert subject in caught.value.subject


def test_a_small_file_cannot_stand_for_too_much(tmp_path: Path) -> None:
    make_vera(tmp_path, BASE, rank=256, save_projection=False)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(AdapterTooLargeError, match="bytes of matrices"):
        read(tmp_path, BASE, AdapterLimits(max_size_bytes=size))
