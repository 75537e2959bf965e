"""What AdapterHub has for encoders alone, in the store: how it is lowered, and every refusal with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.methods.reft import orthonormal_rows
from manyhats.adapters.primitives import Affine, Bottleneck, KVPrefix, LowRank, PrefixGate, PromptEmbeddings
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapterhub import (
    ENCODER_PRESETS,
    NAME,
    PRESETS,
    adapterhub_config,
    adapterhub_tensors,
    make_adapterhub,
    write_adapterhub,
)
from support.factories.adapters import make_base
from support.factories.registrations import assert_refused
from support.factories.tiny_encoders import HIDDEN, make_encoder_base

BASE = make_encoder_base()
DECODER = make_base(names=("org/tiny",))
METHODS = {
    "prompt": AdapterMethod.PROMPT_TUNING,
    "prompt_after_bos": AdapterMethod.PROMPT_TUNING,
    "gated_seq_bn": AdapterMethod.BOTTLENECK,
    "gated_lora": AdapterMethod.LORA,
    "gated_ia3": AdapterMethod.IA3,
    "gated_prefix": AdapterMethod.PREFIX_TUNING,
    "gated_prefix_flat": AdapterMethod.PREFIX_TUNING,
    "unipelt": AdapterMethod.UNION,
    "seq_bn_inv": AdapterMethod.BOTTLENECK,
    "loreft": AdapterMethod.REFT,
    "noreft": AdapterMethod.REFT,
    "direft": AdapterMethod.REFT,
}


def make_store(tmp_path: Path, base: BaseDescription = BASE, **limits: Any) -> AdapterStore:
    return open_store(tmp_path / "store", base, [tmp_path], limits=AdapterLimits(**limits))


@pytest.mark.parametrize("preset", ENCODER_PRESETS)
def test_every_preset_is_served_on_an_encoder_only(tmp_path: Path, preset: str) -> None:
    make_adapterhub(tmp_path / "source", BASE, preset)
    record = make_store(tmp_path).register(Registration("task", Uri(str(tmp_path / "source")))).record
    assert record.method is METHODS[preset]


@pytest.mark.parametrize("preset", ENCODER_PRESETS)
def test_none_is_served_on_a_decoder(tmp_path: Path, preset: str) -> None:
    make_adapterhub(tmp_path / "source", DECODER, preset)
    keys = {"unipelt": "use_gating", "seq_bn_inv": "inv_adapter"}
    key = keys.get(preset, "use_gating" if preset.startswith("gated") else "architecture")
    assert_refused(make_store(tmp_path, DECODER), tmp_path / "source", AdapterUnsupportedError, key)


@pytest.mark.parametrize("preset", ["prompt", "prompt_after_bos"])
def test_a_prompt_is_as_wide_as_the_embedding(tmp_path: Path, preset: str) -> None:
    base = make_encoder_base("electra", embedding_size=8)
    make_adapterhub(tmp_path / "source", base, preset)
    store = make_store(tmp_path, base)
    record = store.register(Registration("task", Uri(str(tmp_path / "source")))).record
    prefix = store.lower(record).prefix
    assert isinstance(prefix, PromptEmbeddings)
    assert prefix.embeddings.shape == (5, 8)
    assert (prefix.are_normed, prefix.are_read) == (True, preset == "prompt")
    assert prefix.position_offset == -5


FIELDS: list[tuple[str, dict[str, Any], type[AdapterError], str]] = [
    ("prompt", {"combine": "suffix"}, AdapterUnsupportedError, "combine"),
    ("prompt", {"prompt_length": 0}, AdapterInvalidError, "prompt_length"),
    ("prompt", {"prompt_length": 9}, AdapterTooLargeError, "prompt_length"),
    ("prompt", {"a_new_field": 1}, AdapterUnsupportedError, "a_new_field"),
    ("seq_bn_inv", {"inv_adapter": "glow"}, AdapterUnsupportedError, "inv_adapter"),
    (
        "seq_bn_inv",
        {"inv_adapter_reduction_factor": None},
        AdapterInvalidError,
        "inv_adapter_reduction_factor",
    ),
    ("seq_bn_inv", {"inv_adapter_reduction_factor": 0}, AdapterInvalidError, "inv_adapter_reduction_factor"),
    ("seq_bn_inv", {"inv_adapter_reduction_factor": 99}, AdapterInvalidError, "inv_adapter_reduction_factor"),
    ("seq_bn_inv", {"inv_adapter": None}, AdapterInvalidError, "invertible_adapters"),
    ("loreft", {"prefix_positions": 0}, AdapterInvalidError, "prefix_positions"),
    ("loreft", {"suffix_positions": -1}, AdapterInvalidError, "suffix_positions"),
    ("loreft", {"suffix_positions": "1"}, AdapterInvalidError, "suffix_positions"),
    ("loreft", {"layers": "some"}, AdapterInvalidError, "layers"),
    ("loreft", {"r": 0}, AdapterInvalidError, "r"),
    ("loreft", {"r": HIDDEN}, AdapterUnsupportedError, "r"),
    ("noreft", {"r": 5}, AdapterTooLargeError, "r"),
    ("loreft", {"output_reft": False}, AdapterInvalidError, "output_reft"),
    ("loreft", {"non_linearity": "relu"}, AdapterUnsupportedError, "non_linearity"),
    ("direft", {"non_linearity": "prelu"}, AdapterUnsupportedError, "non_linearity"),
    ("noreft", {"subtract_projection": None}, AdapterUnsupportedError, "subtract_projection"),
    ("noreft", {"a_new_field": 1}, AdapterUnsupportedError, "a_new_field"),
    ("gated_lora", {"use_gating": 1}, AdapterInvalidError, "use_gating"),
    ("gated_prefix", {"shared_gating": "yes"}, AdapterInvalidError, "shared_gating"),
]


@pytest.mark.parametrize(("preset", "fields", "error", "key"), FIELDS)
def test_fields_that_cannot_be_served_are_refused_by_name(
    tmp_path: Path, preset: str, fields: dict[str, Any], error: type[AdapterError], key: str
) -> None:
    config = adapterhub_config(BASE, preset)
    tensors = adapterhub_tensors(BASE, config)
    config["config"] |= fields
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(make_store(tmp_path, max_virtual_tokens=8, max_rank=4), tmp_path / "source", error, key)


PROMPT = f"bert.prompt_tuning.prompt_tunings.{NAME}.prompt_embedding.weight"
DOWN = f"bert.encoder.layer.1.output.adapters.{NAME}.gate.bias"
QUERY = f"bert.encoder.layer.0.attention.self.query.loras.{NAME}"
COUPLING = f"bert.invertible_adapters.{NAME}"
UNIT = f"bert.encoder.layer.0.reft_layer.refts.{NAME}.units.0.projection.parametrizations.weight"
PREFIX = f"bert.encoder.layer.1.attention.self.prefix_tuning.prefix_gates.{NAME}"


@pytest.mark.parametrize(
    ("preset", "changes", "name"),
    [
        ("seq_bn_inv", {f"{COUPLING}.F.2.bias": None}, f"{COUPLING}.F.2.bias"),
        ("seq_bn_inv", {f"{COUPLING}.G.0.weight": (4, 3)}, f"{COUPLING}.G.0.weight"),
        ("loreft", {f"{UNIT}.original": None}, f"{UNIT}.original"),
        ("loreft", {f"{UNIT}.0.base": (HIDDEN, 2)}, f"{UNIT}.0.base"),
        ("loreft", {f"{UNIT}.0.base": (HIDDEN, HIDDEN)}, f"{UNIT}.original"),
        ("gated_seq_bn", {DOWN: None}, DOWN),
        ("gated_seq_bn", {DOWN: (2,)}, DOWN),
        ("gated_lora", {f"{QUERY}.gate.weight": None}, f"{QUERY}.gate.weight"),
        ("gated_lora", {f"{QUERY}.gate.weight": (3, HIDDEN)}, f"{QUERY}.gate.weight"),
        ("gated_lora", {f"{QUERY}.lora_A": None, f"{QUERY}.lora_B": None}, f"{QUERY}.gate.bias"),
        ("gated_ia3", {f"{QUERY}.gate.bias": (1,)}, f"{QUERY}.gate.bias"),
        ("gated_prefix", {f"{PREFIX}.weight": None}, f"{PREFIX}.weight"),
        ("gated_prefix_flat", {f"{PREFIX}.weight": (1, HIDDEN)}, f"{PREFIX}.weight"),
        ("prompt", {PROMPT: None}, PROMPT),
        ("prompt", {PROMPT: (5, 17)}, PROMPT),
        ("prompt", {"bert.more.weight": (3,)}, "bert.more.weight"),
    ],
)
def test_tensors_that_do_not_match_are_refused_by_name(
    tmp_path: Path, preset: str, changes: dict[str, tuple[int, ...] | None], name: str
) -> None:
    config = adapterhub_config(BASE, preset)
    tensors = adapterhub_tensors(BASE, config)
    for tensor, shape in changes.items():
        tensors[tensor] = torch.ones(shape or ())
        if shape is None:
            del tensors[tensor]
    write_adapterhub(tmp_path / "source", config, tensors or {"bert.more.weight": torch.ones(1)})
    assert_refused(
        make_store(tmp_path),
        tmp_path / "source",
        AdapterInvalidError,
        name if tensors else "bert.more.weight",
    )


@pytest.mark.parametrize("preset", ["gated_seq_bn", "gated_lora", "gated_ia3", "gated_prefix"])
def test_gates_that_the_config_does_not_ask_for_are_refused(tmp_path: Path, preset: str) -> None:
    config = adapterhub_config(BASE, preset)
    tensors = adapterhub_tensors(BASE, config)
    config["config"]["use_gating"] = False
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(make_store(tmp_path), tmp_path / "source", AdapterInvalidError, "gate")


def test_a_gate_stands_in_place_of_the_constant_factor(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for name in ("gated_lora", "gated_ia3"):
        make_adapterhub(tmp_path / name, BASE, name, scale=0.3)
        record = store.register(Registration(name, Uri(str(tmp_path / name)))).record
        for delta in store.lower(record).deltas:
            assert isinstance(delta, LowRank | Affine)
            assert delta.gate is not None
            assert delta.gate.weight.shape[0] == 1
            if isinstance(delta, LowRank):
                assert delta.scale == 1.0
            else:
                assert delta.scale is not None
                assert 0.5 < float(delta.scale.mean()) < 1.5


def test_gated_deltas_do_not_meet_others(tmp_path: Path) -> None:
    for name, fields in (("gated_lora", {}), ("lora", {})):
        make_adapterhub(tmp_path / name, BASE, name, **fields)
    parts = Parts(tuple(Part(str(tmp_path / name)) for name in ("gated_lora", "lora")))
    with pytest.raises(AdapterUnsupportedError, match="a gate is one delta's"):
        make_store(tmp_path).register(Registration("task", parts))


def test_a_union_has_virtual_tokens_once(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "unipelt", configs=[ENCODER_PRESETS["prompt"], PRESETS["prefix"]])
    write_adapterhub(tmp_path / "source", config, adapterhub_tensors(BASE, config))
    assert_refused(make_store(tmp_path), tmp_path / "source", AdapterUnsupportedError, "configs")


def test_a_union_is_its_parts_together(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    config = adapterhub_config(BASE, "unipelt")
    tensors = adapterhub_tensors(BASE, config)
    write_adapterhub(tmp_path / "union", config, tensors)
    (whole,) = (store.lower(store.register(Registration("u", Uri(str(tmp_path / "union")))).record),)
    sites = [delta.site for delta in whole.deltas if isinstance(delta, LowRank | Bottleneck | PrefixGate)]
    assert len(sites) == len(set(sites)) == len(whole.deltas) == 8
    assert isinstance(whole.prefix, KVPrefix)


def test_a_union_with_a_tensor_of_no_part_is_refused(tmp_path: Path) -> None:
    config = adapterhub_config(BASE, "unipelt")
    tensors = adapterhub_tensors(BASE, config)
    config["config"]["configs"] = config["config"]["configs"][:2]
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(make_store(tmp_path), tmp_path / "source", AdapterInvalidError, "loras")


def test_a_projection_is_what_torch_s_parametrization_gives() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        linear = nn.utils.parametrizations.orthogonal(nn.Linear(9, 4, bias=False))
    parametrization: Any = linear.parametrizations
    original, base = parametrization.weight.original, parametrization.weight[0].base
    with torch.no_grad():
        original[:, 4:] = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
        original.diagonal()[1] = -1
        found = orthonormal_rows(original, base)
        torch.testing.assert_close(found, linear.weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-6, rtol=1e-6)


def test_reft_counts_no_rows_from_before_a_prompt(tmp_path: Path) -> None:
    for preset, is_served in (("prompt", True), ("prompt_after_bos", False)):
        config = adapterhub_config(
            BASE, "unipelt", configs=[ENCODER_PRESETS[preset], ENCODER_PRESETS["loreft"]]
        )
        source = tmp_path / preset / "source"
        write_adapterhub(source, config, adapterhub_tensors(BASE, config))
        store = open_store(tmp_path / preset / "store", BASE, [tmp_path])
        if is_served:
            assert store.register(Registration("task", Uri(str(source)))).record.method is AdapterMethod.UNION
        else:
            assert_refused(store, source, AdapterUnsupportedError, "combine")
