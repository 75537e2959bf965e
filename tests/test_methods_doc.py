"""docs/methods.md names every method, every key that is refused, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.formats.adapterhub import bottleneck as adapterhub_bottleneck
from manyhats.adapters.formats.adapterhub import loras as adapterhub_loras
from manyhats.adapters.formats.peft import format as peft_format
from manyhats.adapters.formats.peft import prompt_config
from manyhats.adapters.formats.peft.lora_config import LORA_REFUSED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
REFUSED = {
    *LORA_REFUSED,
    *prompt_config._REFUSED,
    *adapterhub_bottleneck._REFUSED,
    *adapterhub_loras._REFUSED,
    "use_gating",
}


@pytest.mark.parametrize("method", AdapterMethod, ids=lambda method: method.value)
def test_every_method_has_a_row(method: AdapterMethod) -> None:
    first_cells = re.findall(r"^\| ([\w -]+?) \|", PAGE, flags=re.MULTILINE)
    assert method.value.replace("_", " ").replace("p tuning", "p-tuning") in map(str.casefold, first_cells)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_every_refused_key_is_named(key: str) -> None:
    assert f"`{key}`" in PAGE


@pytest.mark.parametrize("peft_type", peft_format._REFUSED_TYPES)
def test_every_refused_kind_is_named(peft_type: str) -> None:
    assert f"`peft_type` {peft_type} " in PAGE


@pytest.mark.parametrize("peft_type", peft_format._PEFT_TYPES)
def test_every_served_kind_is_named(peft_type: str) -> None:
    assert re.search(rf"\b{peft_type}\b", PAGE)


@pytest.mark.parametrize("pattern", sorted(set(re.findall(r"`((?:tests/[\w/]+/)?test_[\w*]+\.py)`", PAGE))))
def test_tests_that_are_named_exist(pattern: str) -> None:
    assert any(ROOT.glob(pattern if pattern.startswith("tests/") else f"tests/adapters/**/{pattern}"))
