from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig

from manyhats.adapters.equations import low_rank
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.methods.adalora import adalora_scale
from manyhats.adapters.primitives import LowRank
from support.factories.adapters import ALL_LINEARS, make_adalora, make_base
from support.oracles.methods import adalora_delta
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
    "attention": {"target_modules": ["q_proj", "v_proj"], "init_r": 4},
    "all linears": {"target_modules": list(ALL_LINEARS), "init_r": 6, "target_r": 2, "lora_alpha": 20},
    "what its layers do not read": {
        "target_modules": ["up_proj"],
        "init_r": 3,
        "r": 5,
        "use_rslora": True,
        "alpha_pattern": {"up_proj": 2},
    },
    "head": {"target_modules": ["q_proj", "lm_head"], "init_r": 3},
}


@pytest.mark.parametrize("family", PEFT_FAMILIES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_peft_s(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    peft = make_peft(model, AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, **config), size=0.3)
    save_peft(peft, tmp_path)
    check_against_peft(model, tmp_path)


def test_a_pruned_adapter_keeps_the_scale_of_its_initial_rank(tmp_path: Path) -> None:
    """Ranks as PEFT's allocator leaves them, one of them 0."""
    model = tiny_model()
    base = describe_model(model)
    kept = {"q_proj": 2, "up_proj": 0, "v_proj": 5}
    make_adalora(tmp_path, base, initial_rank=6, kept=kept, alpha=9, sites=[*kept, "o_proj"])
    lowered = check_against_peft(model, tmp_path)
    updates = [delta for delta in lowered.deltas if isinstance(delta, LowRank)]
    assert {delta.scale for delta in updates} == {9 / (6 + 1e-5)}
    assert {(delta.site.name, delta.rank) for delta in updates} == {
        ("q_proj", 2),
        ("v_proj", 5),
        ("o_proj", 6),
    }


def test_the_delta_is_that_of_lora_with_the_singular_values_in_a() -> None:
    x, a, e, b = (torch.randn(shape) for shape in ((5, 6), (3, 6), (3, 1), (4, 3)))
    expected = low_rank(x, a * e, b, adalora_scale(4, 12))
    torch.testing.assert_close(adalora_delta(x, a, e, b, 4 / (12 + 1e-5)), expected)


def test_fused_projections_are_split_by_their_parts(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    make_adalora(tmp_path, describe_model(model), sites=["q_proj", "up_proj"])
    lowered = check_against_peft(model, tmp_path)
    assert {delta.site.name for delta in lowered.deltas if isinstance(delta, LowRank)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    }


@pytest.mark.parametrize(
    ("fields", "error", "subject"),
    [
        ({"init_r": 7}, AdapterInvalidError, "lora_A"),
        ({"init_r": 0}, AdapterInvalidError, "init_r"),
        ({"lora_alpha": 0}, AdapterInvalidError, "lora_alpha"),
        ({"lora_alpha": "a"}, AdapterInvalidError, "lora_alpha"),
        ({"rank_pattern": [1]}, AdapterInvalidError, "rank_pattern"),
        ({"rank_pattern": {"x.lora_E": 3}}, AdapterInvalidError, "rank_pattern"),
        ({"rank_pattern": {"x.lora_E": [True]}}, AdapterInvalidError, "rank_pattern"),
        (
            {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 5 + [False]}},
            AdapterInvalidError,
            "0.self_attn.q_proj.lora_A",
        ),
        ({"use_dora": True}, AdapterUnsupportedError, "use_dora"),
        ({"lora_bias": True}, AdapterUnsupportedError, "lora_bias"),
        ({"kasa_config": {"a": 1}}, AdapterUnsupportedError, "kasa_config"),
        ({"init_lora_weights": "pissa"}, AdapterUnsupportedError, "init_lora_weights"),
        ({"surprise": 1}, AdapterUnsupportedError, "surprise"),
        ({"bias": "vera_only"}, AdapterInvalidError, "bias"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(
    fields: dict[str, Any], error: type[AdapterError], subject: str, tmp_path: Path
) -> None:
    make_adalora(tmp_path, BASE, sites=["q_proj"], **fields)
    with pytest.raises(error) as caught:
        read(tmp_path, BASE)
    assert subject in caught.value.subject


def test_the_rank_is_limited(tmp_path: Path) -> None:
    make_adalora(tmp_path, BASE, initial_rank=9, sites=["q_proj"])
    with pytest.raises(AdapterTooLargeError, match="rank 9; the limit is 8"):
        read(tmp_path, BASE, AdapterLimits(max_rank=8))


def test_an_adapter_that_training_emptied_has_no_effect(tmp_path: Path) -> None:
    make_adalora(tmp_path, BASE, kept={"q_proj": 0}, sites=["q_proj"])
    with pytest.raises(AdapterError, match="changes nothing"):
        read(tmp_path, BASE)


def test_defaults_are_peft_s(tmp_path: Path) -> None:
    make_adalora(tmp_path, BASE, initial_rank=12, sites=["q_proj"])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "ADALORA"}))
    delta = read_lowered(tmp_path, BASE).deltas[0]
    assert isinstance(delta, LowRank)
    assert delta.scale == 8 / (12 + 1e-5)
