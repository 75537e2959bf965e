"""Inspection: what a directory holds, and every refusal of it, with and without a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.adapters.errors import SourceNotFoundError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.inspect import Inspection, inspect
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from support.factories.adapterhub import (
    PRESETS,
    adapterhub_config,
    adapterhub_tensors,
    make_adapterhub,
    write_adapterhub,
)
from support.factories.adapters import lora_config, lora_tensors, make_base, make_lora, write_adapter

BASE = make_base(names=("org/tiny",))
BASES = pytest.mark.parametrize("base", [BASE, None], ids=["with base", "without"])


def reasons(found: Inspection) -> list[tuple[str, str]]:
    return [(refusal.reason, refusal.subject) for refusal in found.refusals]


@BASES
def test_a_lora_of_peft_is_shown(tmp_path: Path, base: BaseDescription | None) -> None:
    make_lora(tmp_path / "a", BASE, rank={"q_proj": 2, "up_proj": 4}, sites=["q_proj", "up_proj"])
    found = inspect(tmp_path / "a", base)
    assert (found.format, found.method, found.base_model) == ("peft", "lora", "org/tiny")
    assert found.path == str(tmp_path / "a")
    assert found.compared_with == ("org/tiny" if base else "")
    q, up = found.sites
    assert (q.site, q.operation, q.layers, q.ranks) == ("q_proj", "LowRank", (0, 1), (2,))
    assert q.shapes == {"a": ((2, 32),), "b": ((32, 2),)}
    assert (up.site, up.ranks) == ("up_proj", (4,))
    assert found.num_parameters == 2 * (2 * 32 + 32 * 2 + 4 * 32 + 48 * 4)
    assert len(found.tensors) == 8
    assert (found.tensors[0].dtype, found.tensors[0].shape) == ("float32", (4, 32))
    assert found.refusals == ()
    assert [note for note in found.notes if "base model" in note] == list(found.notes)
    assert bool(found.notes) == (base is None)


@BASES
@pytest.mark.parametrize("preset", PRESETS)
def test_every_adapterhub_method_is_shown(tmp_path: Path, preset: str, base: BaseDescription | None) -> None:
    make_adapterhub(tmp_path / "a", BASE, preset)
    found = inspect(tmp_path / "a", base)
    assert found.format == "adapterhub"
    assert found.method
    assert found.refusals == ()
    assert bool(found.sites) == (not preset.startswith("prefix"))
    assert bool(found.num_virtual_tokens) == (preset.startswith("prefix") or preset == "mam")
    store = open_store(tmp_path / "store", BASE, [tmp_path])
    record = store.register(Registration("task", Uri(str(tmp_path / "a")))).record
    assert (found.digest, found.size_bytes) == (record.digest, record.size_bytes)
    assert found.num_parameters == record.num_parameters


def test_bottleneck_sizes_and_layers_are_shown(tmp_path: Path) -> None:
    make_adapterhub(tmp_path / "a", BASE, "seq_bn", reduction_factor={"0": 4, "1": 8}, ln_after=True)
    (site,) = inspect(tmp_path / "a").sites
    assert (site.site, site.operation, site.layers, site.ranks) == (
        "feed_forward",
        "Bottleneck",
        (0, 1),
        (4, 8),
    )
    assert site.shapes["down"] == ((4, 32), (8, 32))


def test_virtual_tokens_are_counted(tmp_path: Path) -> None:
    make_adapterhub(tmp_path / "a", BASE, "prefix_flat", prefix_length=7)
    assert inspect(tmp_path / "a").num_virtual_tokens == 7


@pytest.mark.parametrize("name", ["pytorch_adapter.bin", "adapter_model.bin"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    make_adapterhub(tmp_path / "a", BASE, "prefix_flat")
    (tmp_path / "a" / "adapter.safetensors").unlink()
    torch.save({}, tmp_path / "a" / name)
    found = inspect(tmp_path / "a")
    assert reasons(found) == [("ADAPTER_UNSAFE", name)]
    assert "manyhats adapters convert SRC DST" in found.refusals[0].description
    assert found.method == "prefix_tuning"
    assert found.tensors == ()


@BASES
def test_a_refused_field_leaves_the_rest_to_be_seen(tmp_path: Path, base: BaseDescription | None) -> None:
    make_adapterhub(tmp_path / "a", BASE, "seq_bn", use_gating=True)
    found = inspect(tmp_path / "a", base)
    assert reasons(found) == [("ADAPTER_UNSUPPORTED", "use_gating")]
    assert found.method == "bottleneck"
    assert len(found.tensors) == 12
    assert found.config is not None
    assert found.config["config"]["use_gating"] is True


def test_several_refusals_are_told_together(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE, sites=["q_proj"])
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    config = lora_config(
        BASE, sites=["q_proj"], base_model_name_or_path="org/other", layer_replication=[[0, 1]]
    )
    write_adapter(tmp_path / "a", config, tensors)
    assert reasons(inspect(tmp_path / "a", BASE)) == [
        ("BASE_MISMATCH", "base_model_name_or_path"),
        ("ADAPTER_INVALID", first),
        ("ADAPTER_UNSUPPORTED", "layer_replication"),
    ]


def test_shapes_are_compared_with_a_base_only_where_there_is_one(tmp_path: Path) -> None:
    wide = make_base(names=("org/tiny",), hidden_size=64)
    make_lora(tmp_path / "a", wide, sites=["q_proj"])
    assert inspect(tmp_path / "a").refusals == ()
    assert [reason for reason, _ in reasons(inspect(tmp_path / "a", BASE))] == ["ADAPTER_INVALID"]
    make_adapterhub(tmp_path / "b", wide, "par_bn")
    assert inspect(tmp_path / "b").refusals == ()
    assert reasons(inspect(tmp_path / "b", BASE)) == [("BASE_MISMATCH", "hidden_size")]


def test_shapes_that_contradict_each_other_need_no_base(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE, sites=["q_proj"])
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    write_adapter(tmp_path / "a", lora_config(BASE, sites=["q_proj"]), tensors)
    assert reasons(inspect(tmp_path / "a")) == [("ADAPTER_INVALID", name)]


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    make_lora(tmp_path / "a", BASE, scale=0.0)
    assert [reason for reason, _ in reasons(inspect(tmp_path / "a"))] == ["ADAPTER_NO_EFFECT"]


def test_limits_hold(tmp_path: Path) -> None:
    make_lora(tmp_path / "a", BASE, rank=8)
    found = inspect(tmp_path / "a", limits=AdapterLimits(max_rank=4))
    assert [reason for reason, _ in reasons(found)] == ["ADAPTER_TOO_LARGE"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "ADAPTER_INVALID"), ("{}", "ADAPTER_INVALID"), ('{"peft_type": "HIRA"}', "ADAPTER_UNSUPPORTED")],
)
def test_configs_that_are_none_are_told_once(tmp_path: Path, content: str, reason: str) -> None:
    make_lora(tmp_path / "a", BASE)
    (tmp_path / "a" / "adapter_config.json").write_text(content)
    assert [found for found, _ in reasons(inspect(tmp_path / "a"))] == [reason]


def test_a_truncated_file_is_told_with_the_config(tmp_path: Path) -> None:
    make_lora(tmp_path / "a", BASE)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = inspect(tmp_path / "a")
    assert [reason for reason, _ in reasons(found)] == ["ADAPTER_INVALID"]
    assert found.method == "lora"


def test_an_empty_directory_lacks_its_config(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert reasons(inspect(tmp_path / "a")) == [("ADAPTER_INVALID", "adapter_config.json")]


def test_a_directory_of_adapters_names_them_and_is_told_once(tmp_path: Path) -> None:
    make_lora(tmp_path / "a" / "sql", BASE)
    (refusal,) = inspect(tmp_path / "a").refusals
    assert refusal.subject == "adapter_config.json"
    assert refusal.description.endswith("look like adapters; register one of them: sql")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        inspect(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"num_layers": "two", "token_dim": [], "num_attention_heads": 0}, (4, 8)),
        ({"num_layers": 2, "token_dim": 1, "num_attention_heads": 2}, (0, 8)),
        ({"hidden_size": "wide", "config": {"leave_out": ["x"], "prefix_length": -1}}, ()),
        ({"hidden_size": 32, "config": {"architecture": "lora", "leave_out": [10**9]}}, (3,)),
    ],
)
def test_nonsense_is_refused_and_does_not_break_inspection(
    tmp_path: Path, config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    for peft_type in ("PREFIX_TUNING", "LORA", "PROMPT_TUNING", "IA3", "VERA", "ADALORA"):
        known = config if "config" in config else config | {"peft_type": peft_type}
        names = ("prompt_embeddings", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
        tensors = {name: torch.ones(shape) for name in names}
        write_adapter(tmp_path / peft_type, known, tensors)
        (tmp_path / peft_type / "adapter_model.safetensors").rename(
            tmp_path
            / peft_type
            / ("adapter.safetensors" if "config" in config else "adapter_model.safetensors")
        )
        assert inspect(tmp_path / peft_type).refusals


def test_an_adapterhub_config_alone_is_shown(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "lora", use_dora=True)
    write_adapterhub(tmp_path / "a", config, adapterhub_tensors(BASE, config))
    found = inspect(tmp_path / "a")
    assert reasons(found) == [("ADAPTER_UNSUPPORTED", "use_dora")]
    assert json.loads(json.dumps(found.config)) == config
