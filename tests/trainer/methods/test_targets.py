"""Names of linears: what they select on families that call them otherwise, and by which names PEFT finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.sites import BaseDescription
from manyhats.trainer.errors import SettingError
from manyhats.trainer.methods.head import UNTRAINED
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


@pytest.mark.parametrize("family", [family for family in ENCODERS if family.split()[0] not in UNTRAINED])
def test_linears_have_one_name_on_all_families(family: str, tmp_path: Path) -> None:
    base = describe(family, tmp_path)
    for setting in (Ia3Settings().output_modules, Ia3Settings().input_modules):
        chosen = choose_modules(setting, "names", base)
        sites = {part.site.name for target in chosen.targets for part in target.parts}
        assert sites == set(setting)
        assert len(chosen.targets) == len(setting) * base.num_layers
        found = {path for path in base.modules if any(matches(path, name) for name in chosen.names)}
        assert found == {target.module for target in chosen.targets}


def test_names_that_are_none_s_are_refused_with_those_that_are(tmp_path: Path) -> None:
    base = describe("bert", tmp_path)
    with pytest.raises(SettingError, match=r"'gate_proj' is not a linear of this base; it has .*query"):
        choose_modules(("gate_proj",), "target_modules", base)
    with pytest.raises(SettingError, match=r"'dense' also names pooler\.dense, which is part of heads"):
        choose_modules(("dense",), "target_modules", base)
