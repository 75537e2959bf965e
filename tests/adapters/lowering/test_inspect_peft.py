"""Inspection of every method that PEFT saves, with a base and without one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, TaskType

from manyhats.adapters.lowering.inspect import inspect
from manyhats.adapters.sites import BaseDescription
from support.factories.adapters import (
    make_adalora,
    make_base,
    make_dora,
    make_ia3,
    make_lora,
    make_token_rows,
    make_trainable_tokens,
    make_vera,
)
from support.factories.prefixes import make_multitask_prompt, make_p_tuning, make_prefix, make_prompt
from support.factories.tiny_encoders import ENCODERS, LINEARS, POOLERS, make_encoder
from support.factories.tiny_models import linears_of
from support.oracles.peft import make_peft, save_peft, tiny_model

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
    "trainable-tokens": {"EmbeddingRows", "HeadRows"},
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
    "trainable-tokens": make_trainable_tokens,
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


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gptj", "opt", "falcon", "phi", "cohere"])
def test_modules_of_every_family_are_found_without_a_base(family: str, tmp_path: Path) -> None:
    names = linears_of(family)
    peft = make_peft(tiny_model(family), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names))
    found = inspect(save_peft(peft, tmp_path / "a"))
    assert found.refusals == ()
    assert {site.site.rpartition(".")[2] for site in found.sites} == {
        name.rpartition(".")[2] for name in names
    }
    assert all(site.layers == (0, 1) for site in found.sites)


@pytest.mark.parametrize("family", ENCODERS)
def test_heads_of_every_encoder_are_found_without_a_base(family: str, tmp_path: Path) -> None:
    transformers: Any = import_module("transformers")
    directory = make_encoder(tmp_path / "model", family)
    for auto, task_type, kind in (
        ("AutoModelForSequenceClassification", TaskType.SEQ_CLS, "classify"),
        ("AutoModelForTokenClassification", TaskType.TOKEN_CLS, "classify_tokens"),
        ("AutoModelForQuestionAnswering", TaskType.QUESTION_ANS, "span"),
        ("AutoModel", TaskType.FEATURE_EXTRACTION, "embed"),
    ):
        model = getattr(transformers, auto).from_pretrained(directory)
        names = [*LINEARS[family], *([POOLERS[family]] if family in POOLERS else [])]
        config = LoraConfig(task_type=task_type, r=4, target_modules=names)
        if task_type == TaskType.QUESTION_ANS and family.startswith("modernbert"):
            config.modules_to_save = ["classifier"]
        peft = make_peft(model, config)
        found = inspect(save_peft(peft, tmp_path / task_type))
        assert found.refusals == ()
        assert (found.kind, found.num_outputs) == (kind, 0 if kind == "embed" else 2)
        sites = {site.site for site in found.sites}
        ends = [name.removeprefix("mlp.") for name in LINEARS[family]]
        assert all(site.endswith(tuple(ends)) for site in sites)
        assert all(any(site.endswith(end) for site in sites) for end in ends)
