"""AdapterHub directories in the store: what is served, how it is lowered, and every refusal with its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterNoEffectError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    BaseMismatchError,
)
from manyhats.adapters.formats.recognition import recognise
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.primitives import Affine, KVPrefix, LoweredAdapter, LowRank
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.sites import BaseDescription, Site
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapterhub import (
    NAME,
    PRESETS,
    adapterhub_config,
    adapterhub_tensors,
    make_adapterhub,
    write_adapterhub,
)
from support.factories.adapters import make_base
from support.factories.registrations import assert_refused

BASE = make_base(names=("org/tiny",))
METHODS = {
    "seq_bn": AdapterMethod.BOTTLENECK,
    "double_seq_bn": AdapterMethod.BOTTLENECK,
    "par_bn": AdapterMethod.BOTTLENECK,
    "compacter": AdapterMethod.BOTTLENECK,
    "lora": AdapterMethod.LORA,
    "ia3": AdapterMethod.IA3,
    "prefix": AdapterMethod.PREFIX_TUNING,
    "prefix_flat": AdapterMethod.PREFIX_TUNING,
    "mam": AdapterMethod.UNION,
}


def lower_artifact(
    config: dict[str, Any], tensors: dict[str, Tensor], base: BaseDescription = BASE
) -> LoweredAdapter:
    artifact = AdapterArtifact(
        digest="sha256:0",
        method=recognise(config),
        config=config,
        tensors=tensors,
        base_model="",
        size_bytes=0,
        num_parameters=0,
    )
    return lower(artifact, base)


def make(preset: str, **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = adapterhub_config(BASE, preset, **overrides)
    return config, adapterhub_tensors(BASE, config)


def make_store(tmp_path: Path, base: BaseDescription = BASE, **limits: Any) -> AdapterStore:
    (tmp_path / "source").mkdir(exist_ok=True)
    return open_store(tmp_path / "store", base, [tmp_path / "source"], limits=AdapterLimits(**limits))


# What is served


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_keeps_and_loads_every_method(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    store = make_store(tmp_path)
    make_adapterhub(tmp_path / "source", BASE, preset, dtype=dtype)
    record = store.register(Registration("task", Uri(str(tmp_path / "source")))).record
    assert record.method is METHODS[preset]
    assert record.base_model == "org/tiny"
    (artifact,) = store.load(record).artifacts
    lowered = lower(artifact, BASE)
    assert lowered.digest == record.digest
    assert bool(lowered.deltas) == (not preset.startswith("prefix"))
    assert (lowered.prefix is not None) == (preset.startswith("prefix") or preset == "mam")


def test_lora_is_scaled_by_alpha_over_rank_on_the_linears_it_names() -> None:
    config, tensors = make("lora", r=4, alpha=6, output_lora=True, leave_out=[0])
    deltas = lower_artifact(config, tensors).deltas
    assert [delta.site for delta in deltas if isinstance(delta, LowRank)] == [
        Site(1, name) for name in ("q_proj", "up_proj", "v_proj")
    ]
    assert {delta.scale for delta in deltas if isinstance(delta, LowRank)} == {1.5}
    first = deltas[0]
    assert isinstance(first, LowRank)
    assert torch.equal(first.a, tensors[f"model.layers.1.self_attn.q_proj.loras.{NAME}.lora_A"])


@pytest.mark.parametrize(
    ("version", "scale"),
    [
        ("adapters.0.2.1", 1.0),
        ("adapters.1.0.1", 1.0),
        ("adapters.1.1.0.dev0", 1.0),
        ("adapters.1.1.0", 2.0),
        ("adapters.1.1", 2.0),
        ("adapters.1.10.0", 2.0),
        ("3.2.1", 2.0),
        (None, 2.0),
    ],
)
def test_lora_of_versions_before_1_1_is_not_scaled(version: str | None, scale: float) -> None:
    config, tensors = make("lora", r=4, alpha=8)
    config["version"] = version
    assert {d.scale for d in lower_artifact(config, tensors).deltas if isinstance(d, LowRank)} == {scale}


def test_ia3_rescales_outputs_by_alpha_times_its_vector() -> None:
    config, tensors = make("ia3", alpha=2)
    deltas = lower_artifact(config, tensors).deltas
    names = [delta.site.name for delta in deltas if isinstance(delta, Affine) and delta.site.layer == 0]
    assert names == ["down_proj", "k_proj", "v_proj"]
    first = deltas[0]
    assert isinstance(first, Affine)
    vector = tensors[f"model.layers.0.mlp.down_proj.loras.{NAME}.lora_B"]
    assert first.offset is None
    assert first.scale is not None
    torch.testing.assert_close(first.scale, 2 * vector[:, 0])


def test_flat_prefix_holds_keys_and_values_by_turns_and_does_not_shift_positions() -> None:
    config, tensors = make("prefix_flat", prefix_length=3)
    prefix = lower_artifact(config, tensors).prefix
    assert isinstance(prefix, KVPrefix)
    assert prefix.position_offset == -3
    table = next(iter(tensors.values())).reshape(3, 2 * BASE.num_layers, BASE.num_kv_heads, BASE.head_dim)
    for layer in range(BASE.num_layers):
        assert torch.equal(prefix.keys[layer], table[:, 2 * layer])
        assert torch.equal(prefix.values[layer], table[:, 2 * layer + 1])


def test_prefix_network_is_run_when_it_is_loaded() -> None:
    config, tensors = make("prefix", non_linearity="relu")
    own = {name.split(".self_prefix.")[1]: tensor for name, tensor in tensors.items()}
    hidden = functional.relu(
        own["wte.weight"] @ own["control_trans.0.weight"].T + own["control_trans.0.bias"]
    )
    table = hidden @ own["control_trans.2.weight"].T + own["control_trans.2.bias"]
    flat = {f"model.prefix_tuning.prefix_tunings.{NAME}.self_prefix.control_trans": table.reshape(-1)}
    expected = lower_artifact(adapterhub_config(BASE, "prefix_flat"), flat).prefix
    prefix = lower_artifact(config, tensors).prefix
    assert isinstance(prefix, KVPrefix)
    assert isinstance(expected, KVPrefix)
    torch.testing.assert_close(prefix.keys, expected.keys)
    torch.testing.assert_close(prefix.values, expected.values)


def test_prefix_repeated_under_every_layer_is_one_prefix() -> None:
    config, tensors = make("prefix_flat")
    ((name, table),) = tensors.items()
    repeated = {
        name.replace("model.prefix_tuning.", f"model.layers.{layer}.self_attn.prefix_tuning.pool."): table
        for layer in range(2)
    }
    alone, both = (lower_artifact(config, some).prefix for some in (repeated, tensors | repeated))
    assert isinstance(alone, KVPrefix)
    assert isinstance(both, KVPrefix)
    assert torch.equal(alone.keys, both.keys)
    changed = repeated | {name: table + 1}
    with pytest.raises(AdapterInvalidError, match="repeats"):
        lower_artifact(config, changed)


def test_prefix_on_a_base_with_sliding_windows_is_refused() -> None:
    config, tensors = make("prefix_flat")
    with pytest.raises(AdapterUnsupportedError, match="sliding windows"):
        lower_artifact(config, tensors, replace(BASE, has_sliding_window=True))


def test_activations_of_unversioned_configs_are_renamed() -> None:
    config, tensors = make("seq_bn", non_linearity="gelu")
    del config["version"]
    (first, *_) = lower_artifact(config, tensors).deltas
    assert getattr(first, "activation", "") == "gelu_pytorch_tanh"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
def test_other_architectures_with_the_same_layers_are_served(model_type: str) -> None:
    base = replace(BASE, model_type=model_type)
    config = adapterhub_config(base, "double_seq_bn")
    assert len(lower_artifact(config, adapterhub_tensors(base, config), base).deltas) == 4


def test_reduction_factor_below_one_and_beyond_the_hidden_size() -> None:
    for factor, size in ((0.5, 64), (1000, 1)):
        config, tensors = make("par_bn", reduction_factor=factor)
        (first, *_) = lower_artifact(config, tensors).deltas
        assert tuple(getattr(first, "down").shape) == (size, 32)  # noqa: B009


# What is refused, by the config

FIELDS: list[tuple[str, dict[str, Any], type[AdapterError], str]] = [
    ("seq_bn", {"use_gating": True}, AdapterUnsupportedError, "use_gating"),
    ("seq_bn", {"inv_adapter": "nice"}, AdapterUnsupportedError, "inv_adapter"),
    ("seq_bn", {"invertible_adapter": {"block_type": "nice"}}, AdapterUnsupportedError, "invertible_adapter"),
    ("seq_bn", {"cross_adapter": True}, AdapterUnsupportedError, "cross_adapter"),
    ("seq_bn", {"residual_before_ln": "post_add"}, AdapterUnsupportedError, "residual_before_ln"),
    ("seq_bn", {"non_linearity": "prelu"}, AdapterUnsupportedError, "non_linearity"),
    ("seq_bn", {"non_linearity": None}, AdapterInvalidError, "non_linearity"),
    ("seq_bn", {"a_new_field": 1}, AdapterUnsupportedError, "a_new_field"),
    ("seq_bn", {"scaling": "other"}, AdapterInvalidError, "scaling"),
    ("seq_bn", {"scaling": True}, AdapterInvalidError, "scaling"),
    ("seq_bn", {"reduction_factor": 0}, AdapterInvalidError, "reduction_factor"),
    ("seq_bn", {"reduction_factor": {"0": 4}}, AdapterInvalidError, "reduction_factor"),
    ("seq_bn", {"reduction_factor": {"first": 4}}, AdapterInvalidError, "reduction_factor"),
    ("seq_bn", {"output_adapter": False}, AdapterInvalidError, "output_adapter"),
    ("seq_bn", {"ln_before": 1}, AdapterInvalidError, "ln_before"),
    ("seq_bn", {"leave_out": "all"}, AdapterInvalidError, "leave_out"),
    ("compacter", {"phm_dim": 3}, AdapterInvalidError, "phm_dim"),
    ("compacter", {"phm_dim": 0}, AdapterInvalidError, "phm_dim"),
    ("lora", {"use_gating": True}, AdapterUnsupportedError, "use_gating"),
    ("lora", {"use_dora": True}, AdapterUnsupportedError, "use_dora"),
    ("lora", {"vera_d": 0.1}, AdapterUnsupportedError, "vera_d"),
    ("lora", {"vera_b": 0.0}, AdapterUnsupportedError, "vera_b"),
    ("lora", {"n_up_projection": 2}, AdapterUnsupportedError, "n_up_projection"),
    ("lora", {"r": 0}, AdapterInvalidError, "r"),
    ("lora", {"alpha": "8"}, AdapterInvalidError, "alpha"),
    ("lora", {"attn_matrices": "q"}, AdapterInvalidError, "attn_matrices"),
    ("ia3", {"use_gating": True}, AdapterUnsupportedError, "use_gating"),
    ("ia3", {"r": 2}, AdapterInvalidError, "r"),
    ("prefix", {"use_gating": True}, AdapterUnsupportedError, "use_gating"),
    ("prefix", {"leave_out": [1]}, AdapterUnsupportedError, "leave_out"),
    ("prefix", {"non_linearity": "xielu"}, AdapterUnsupportedError, "non_linearity"),
    ("prefix_flat", {"prefix_length": 0}, AdapterInvalidError, "prefix_length"),
    ("lora", {"architecture": "mtl_lora"}, AdapterUnsupportedError, "architecture"),
    ("lora", {"architecture": "reft"}, AdapterUnsupportedError, "architecture"),
    ("mam", {"configs": {}}, AdapterInvalidError, "configs"),
    ("mam", {"configs": []}, AdapterInvalidError, "configs"),
    ("mam", {"configs": ["lora"]}, AdapterInvalidError, "configs"),
    ("mam", {"configs": [dict(PRESETS["lora"])] * 2}, AdapterUnsupportedError, "configs"),
    ("mam", {"configs": [dict(PRESETS["mam"])]}, AdapterUnsupportedError, "configs"),
    ("mam", {"configs": [{"architecture": "mtl_lora"}]}, AdapterUnsupportedError, "architecture"),
    ("mam", {"configs": [dict(PRESETS["par_bn"]) | {"a_new_field": 1}]}, AdapterInvalidError, "prefix"),
    ("mam", {"a_new_field": 1}, AdapterUnsupportedError, "a_new_field"),
    ("lora", {"architecture": "prompt_tuning"}, AdapterUnsupportedError, "architecture"),
    ("lora", {"architecture": ["lora"]}, AdapterInvalidError, "architecture"),
]


@pytest.mark.parametrize(("preset", "fields", "error", "key"), FIELDS)
def test_fields_that_cannot_be_served_are_refused_by_name(
    tmp_path: Path, preset: str, fields: dict[str, Any], error: type[AdapterError], key: str
) -> None:
    store = make_store(tmp_path)
    config, tensors = make(preset)
    config["config"] |= fields
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(store, tmp_path / "source", error, key)


@pytest.mark.parametrize(
    ("changes", "error", "key"),
    [
        ({"model_type": "mistral"}, BaseMismatchError, "model_type"),
        ({"hidden_size": 48}, BaseMismatchError, "hidden_size"),
        ({"model_name": "org/other"}, BaseMismatchError, "model_name"),
        ({"model_name": 7}, AdapterInvalidError, "model_name"),
        ({"name": "a.b"}, AdapterInvalidError, "name"),
        ({"name": None}, AdapterInvalidError, "name"),
        ({"version": "adapters.new"}, AdapterInvalidError, "version"),
        ({"version": 1.3}, AdapterInvalidError, "version"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[AdapterError], key: str
) -> None:
    store = make_store(tmp_path)
    config, tensors = make("lora")
    write_adapterhub(tmp_path / "source", config | changes, tensors)
    assert_refused(store, tmp_path / "source", error, key)


@pytest.mark.parametrize(
    ("model_type", "preset", "fields", "key"),
    [
        ("gemma2", "seq_bn", {}, "model_type"),
        ("gemma3_text", "double_seq_bn", {}, "model_type"),
        ("granite", "par_bn", {}, "model_type"),
        ("qwen2", "seq_bn", {"original_ln_after": False}, "original_ln_after"),
        ("qwen3", "prefix_flat", {}, "model_type"),
    ],
)
def test_architectures_where_the_library_differs_are_refused(
    tmp_path: Path, model_type: str, preset: str, fields: dict[str, Any], key: str
) -> None:
    base = replace(BASE, model_type=model_type)
    store = make_store(tmp_path, base)
    make_adapterhub(tmp_path / "source", base, preset, **fields)
    assert_refused(store, tmp_path / "source", AdapterUnsupportedError, key)


# What is refused, by the tensors

DOWN = f"model.layers.0.output_adapters.adapters.{NAME}.adapter_down.0.weight"
LORA_A = f"model.layers.0.self_attn.q_proj.loras.{NAME}.lora_A"


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return remove


def plus(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(shape)

    return add


TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], None], type[AdapterError], str]] = [
    ("seq_bn", without(DOWN), AdapterInvalidError, DOWN),
    ("seq_bn", plus(DOWN, 7, 32), AdapterInvalidError, DOWN),
    (
        "seq_bn",
        plus(f"model.layers.0.attention_adapters.adapters.{NAME}.adapter_up.bias", 32),
        AdapterInvalidError,
        "attention_adapters",
    ),
    (
        "seq_bn",
        plus(f"model.layers.2.output_adapters.adapters.{NAME}.adapter_up.bias", 32),
        BaseMismatchError,
        "layers.2",
    ),
    (
        "seq_bn",
        plus(f"model.layers.0.output_adapters.adapters.{NAME}.gate.weight", 1, 32),
        AdapterInvalidError,
        "gate",
    ),
    (
        "seq_bn",
        plus(f"model.invertible_adapters.{NAME}.F.0.weight", 8, 16),
        AdapterInvalidError,
        "invertible_adapters",
    ),
    (
        "seq_bn",
        plus("model.layers.0.output_adapters.adapter_fusion_layer.a,b.query.weight", 32, 32),
        AdapterUnsupportedError,
        "adapter_fusion_layer",
    ),
    ("seq_bn", plus("model.embed_tokens.weight", 64, 32), AdapterInvalidError, "embed_tokens"),
    ("lora", without(LORA_A), AdapterInvalidError, "lora_B"),
    ("lora", plus(LORA_A, 3, 32), AdapterInvalidError, LORA_A),
    (
        "lora",
        plus(f"model.layers.0.self_attn.k_proj.loras.{NAME}.lora_A", 4, 32),
        AdapterInvalidError,
        "k_proj",
    ),
    ("lora", plus(f"model.layers.0.mlp.up_proj.loras.{NAME}.lora_A", 4, 32), AdapterInvalidError, "up_proj"),
    ("lora", plus(f"model.layers.0.mlp.other.loras.{NAME}.lora_A", 4, 32), AdapterInvalidError, "other"),
    ("lora", plus("model.layers.0.self_attn.q_proj.loras.else.lora_A", 4, 32), AdapterInvalidError, "else"),
    (
        "lora",
        plus(f"model.layers.9.self_attn.q_proj.loras.{NAME}.lora_A", 4, 32),
        BaseMismatchError,
        "layers.9",
    ),
    (
        "lora",
        plus(f"model.layers.0.self_attn.q_proj.loras.{NAME}.m.weight", 32, 1),
        AdapterUnsupportedError,
        "m.weight",
    ),
    (
        "ia3",
        plus(f"model.layers.0.self_attn.k_proj.loras.{NAME}.lora_A", 1, 32),
        AdapterInvalidError,
        "lora_A",
    ),
    ("ia3", plus(f"model.layers.0.self_attn.k_proj.loras.{NAME}.lora_B", 16), AdapterInvalidError, "lora_B"),
    (
        "prefix_flat",
        plus(f"model.prefix_tuning.prefix_tunings.{NAME}.self_prefix.control_trans", 7),
        AdapterInvalidError,
        "control_trans",
    ),
    (
        "prefix_flat",
        plus(f"model.layers.0.self_attn.prefix_tuning.prefix_gates.{NAME}.weight", 1, 32),
        AdapterInvalidError,
        "prefix_gates",
    ),
]


@pytest.mark.parametrize(("preset", "spoil", "error", "subject"), TENSORS)
def test_tensors_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path,
    preset: str,
    spoil: Callable[[dict[str, Tensor]], None],
    error: type[AdapterError],
    subject: str,
) -> None:
    store = make_store(tmp_path)
    config, tensors = make(preset)
    spoil(tensors)
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(store, tmp_path / "source", error, subject)


def test_lora_in_a_layer_that_is_left_out_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    config, tensors = make("lora")
    config["config"]["leave_out"] = [1]
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(store, tmp_path / "source", AdapterInvalidError, "layers.1")


def test_limits_hold(tmp_path: Path) -> None:
    store = make_store(tmp_path, max_rank=3, max_virtual_tokens=4)
    make_adapterhub(tmp_path / "source", BASE, "lora", r=4)
    assert_refused(store, tmp_path / "source", AdapterTooLargeError, "r")
    make_adapterhub(tmp_path / "source", BASE, "prefix", prefix_length=5)
    assert_refused(store, tmp_path / "source", AdapterTooLargeError, "prefix_length")


@pytest.mark.parametrize("part", ["adapter_up", "scaling"])
def test_a_bottleneck_that_adds_nothing_is_refused(tmp_path: Path, part: str) -> None:
    store = make_store(tmp_path)
    config, tensors = make("par_bn", scaling="learned")
    for name, tensor in tensors.items():
        if part in name:
            tensor.zero_()
    write_adapterhub(tmp_path / "source", config, tensors)
    assert_refused(store, tmp_path / "source", AdapterNoEffectError, "adapter.safetensors")


# What lies beside it


@pytest.mark.parametrize(
    "name",
    [
        "head_config.json",
        "model_head.safetensors",
        "pytorch_model_head.bin",
        "adapter_fusion_config.json",
        "adapter_setup.json",
        "adapter_model.safetensors",
    ],
)
def test_files_that_would_be_left_unused_are_refused(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path)
    make_adapterhub(tmp_path / "source", BASE)
    (tmp_path / "source" / name).write_bytes(b"{}")
    assert_refused(store, tmp_path / "source", AdapterUnsupportedError, name)


def test_pefts_weights_under_adapterhubs_config_are_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    source = make_adapterhub(tmp_path / "source", BASE)
    (source / "adapter.safetensors").rename(source / "adapter_model.safetensors")
    assert_refused(store, source, AdapterInvalidError, "adapter.safetensors")


def test_a_config_of_neither_library_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    source = make_adapterhub(tmp_path / "source", BASE)
    (source / "adapter_config.json").write_text(json.dumps({"config": None, "model_type": "llama"}))
    assert_refused(store, source, AdapterInvalidError, "adapter_config.json")
