"""Names of linears: what they select on families that call them otherwise, and by which names PEFT finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.sites import BaseDescription
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.targets import choose_modules, matches, with_named_modules
from manyhats.trainer.settings.methods import ALL_LINEARS, Ia3Settings, LoraSettings
from support.factories.tiny_encoders import ENCODERS, make_encoder
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny

FUSED: dict[str, dict[str, Any]] = {
    "gpt2": {"kv_heads": 4},
    "gpt_neox": {"kv_heads": 4},
    "opt": {"kv_heads": 4},
    "phi": {"kv_heads": 4},
    "phi3": {},
    "llama": {},
}


def describe(family: str, directory: Path) -> BaseDescription:
    make: Any = make_encoder if family in ENCODERS else make_checkpoint
    return load_tiny(make(directory / "model", family, **FUSED.get(family, {}))).description


def layers_of(base: BaseDescription) -> set[str]:
    return {path for path, parts in base.modules.items() if parts[0].site.layer >= 0}


@pytest.mark.parametrize("family", [*FUSED, *ENCODERS])
def test_all_linears_are_those_of_the_layers_by_any_name(family: str, tmp_path: Path) -> None:
    base = describe(family, tmp_path)
    named = with_named_modules(LoraSettings(), base)
    assert isinstance(named, LoraSettings)
    for names in ((ALL_LINEARS,), named.target_modules):
        chosen = choose_modules(names, "target_modules", base)
        assert {target.module for target in chosen.targets} == layers_of(base)
        found = {path for path in base.modules if any(matches(path, name) for name in chosen.names)}
        assert found == layers_of(base)


@pytest.mark.parametrize("family", [*ENCODERS, *FUSED])
def test_ia3_s_defaults_are_of_all_families(family: str, tmp_path: Path) -> None:
    base = describe(family, tmp_path)
    named = with_named_modules(Ia3Settings(), base)
    assert isinstance(named, Ia3Settings)
    are_apart = all(len(parts) == 1 for parts in base.modules.values() if parts[0].site.name == "q_proj")
    keys = {"k_proj", "v_proj"}
    for names, sites in (
        (named.output_modules, keys if are_apart else {"q_proj", *keys}),
        (named.input_modules, {"down_proj"}),
    ):
        chosen = choose_modules(names, "names", base)
        assert {part.site.name for target in chosen.targets for part in target.parts} == sites
        num_modules = len(sites) if are_apart else 1
        assert len(chosen.targets) == num_modules * base.num_layers
        found = {path for path in base.modules if any(matches(path, name) for name in chosen.names)}
        assert found == {target.module for target in chosen.targets}


def test_keys_alone_are_no_module_where_queries_are_with_them(tmp_path: Path) -> None:
    base, asked = describe("modernbert", tmp_path), Ia3Settings(output_modules=("k_proj",))
    assert with_named_modules(asked, base) == asked
    with pytest.raises(SettingError, match="q_proj, k_proj, v_proj in one module, Wqkv: name that"):
        choose_modules(asked.output_modules, "output_modules", base)


def test_names_that_are_none_s_are_refused_with_those_that_are(tmp_path: Path) -> None:
    base = describe("bert", tmp_path)
    with pytest.raises(SettingError, match=r"'gate_proj' is not a linear of this base; it has .*query"):
        choose_modules(("gate_proj",), "target_modules", base)
    with pytest.raises(SettingError, match=r"'dense' also names bert\.pooler\.dense, which is part of heads"):
        choose_modules(("dense",), "target_modules", base)


def test_names_are_a_head_s_where_transformers_model_has_them(tmp_path: Path) -> None:
    """RoBERTa's has a pooler if it has no head, though none reads it; ALBERT's is called otherwise than a linear."""
    roberta, albert = describe("roberta", tmp_path / "roberta"), describe("albert", tmp_path / "albert")
    with pytest.raises(SettingError, match=r"'dense' also names (pooler|classifier)\.dense"):
        choose_modules(("dense",), "target_modules", roberta)
    (target,) = choose_modules(("dense",), "target_modules", albert).targets
    assert target.module == "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense"
