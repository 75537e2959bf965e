"""Inspection of every method that PEFT saves, with a base and without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.sites import BaseDescription
from support.factories.adapters import (
    make_adalora,
    make_base,
    make_dora,
    make_ia3,
    make_lora,
    make_token_rows,
    make_vera,
)
from support.factories.prefixes import make_multitask_prompt, make_p_tuning, make_prefix, make_prompt

Maker = Callable[[Path, BaseDescription], Path]

BASE = make_base(names=("org/tiny",))
OPERATIONS = {
    "lora": {"LowRank"},
    "dora": {"LowRank", "Affine"},
    "adalora": {"LowRank"},
    "vera": {"LowRank"},
    "ia3": {"Affine", "InputScale"},
    "token rows": {"LowRank", "EmbeddingRows", "HeadRows"},
    "prefix": set(),
    "prompt": set(),
    "p-tuning": set(),
    "multitask": set(),
}
MAKERS: dict[str, Maker] = {
    "lora": make_lora,
    "dora": make_dora,
    "adalora": make_adalora,
    "vera": make_vera,
    "ia3": make_ia3,
    "token rows": lambda directory, base: make_token_rows(directory, base, ids=[3, 1]),
    "prefix": make_prefix,
    "prompt": make_prompt,
    "p-tuning": make_p_tuning,
    "multitask": make_multitask_prompt,
}


@pytest.mark.parametrize("base", [BASE, None], ids=["with base", "without"])
@pytest.mark.parametrize("method", MAKERS)
def test_every_method_is_shown(tmp_path: Path, method: str, base: BaseDescription | None) -> None:
    MAKERS[method](tmp_path / "a", BASE)
    found = inspect(tmp_path / "a", base)
    assert found.refusals == ()
    assert (found.format, found.base_model) == ("peft", "org/tiny")
    assert {site.operation for site in found.sites} == OPERATIONS[method]
    assert found.num_virtual_tokens == (0 if OPERATIONS[method] else 4)
    assert found.num_parameters > 0
