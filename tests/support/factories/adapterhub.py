"""AdapterHub directories of random weights for Llama's, GPT-2's and BERT's families, written without ``adapters``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyhats.adapters.sites import BaseDescription

NAME = "task"
VERSION = "adapters.1.3.0"

# Linears of a layer, by what configs call them; Llama's other two are named the other way round.
_LLAMA_LINEARS = {
    **{letter: f"self_attn.{letter}_proj" for letter in "qkv"},
    "intermediate": "mlp.down_proj",
    "output": "mlp.up_proj",
}
_BERT_LINEARS = {
    **{name[0]: f"attention.self.{name}" for name in ("query", "key", "value")},
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_LINEARS = {
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), _BERT_LINEARS),
    "albert": {
        **{name[0]: f"albert_layers.0.attention.{name}" for name in ("query", "key", "value")},
        "intermediate": "albert_layers.0.ffn",
        "output": "albert_layers.0.ffn_output",
    },
    "distilbert": {
        **{letter: f"attention.{letter}_lin" for letter in "qkv"},
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
    },
}
_ADAPTERS = {"attention": "attention_adapters", "feed_forward": "output_adapters"}
_BERT_ADAPTERS = {"attention": "attention.output", "feed_forward": "output"}
_LAYERS = {
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), ("encoder.layer", _BERT_ADAPTERS)),
    "albert": (
        "encoder.albert_layer_groups",
        {
            "attention": "albert_layers.0.attention.attention_adapters",
            "feed_forward": "albert_layers.0.output_adapters",
        },
    ),
    "distilbert": ("transformer.layer", _ADAPTERS),
    **dict.fromkeys(("gpt2", "gptj"), ("h", _ADAPTERS)),
}
# Where the gates of prefixes lie in a layer.
_ATTENTION = {"albert": "albert_layers.0.attention", "distilbert": "attention"}
_BOTTLENECK_DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 4,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_LORA_DEFAULTS: dict[str, Any] = {
    "alpha": 8,
    "architecture": "lora",
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "dropout": 0.0,
    "dtype": None,
    "init_weights": "lora",
    "init_weights_seed": None,
    "intermediate_lora": False,
    "leave_out": [],
    "output_lora": False,
    "r": 4,
    "selfattn_lora": True,
    "use_dora": False,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
_PREFIX_DEFAULTS: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 6,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": 5,
    "shared_gating": True,
    "use_gating": False,
}
_PROMPT_DEFAULTS: dict[str, Any] = {
    "architecture": "prompt_tuning",
    "combine": "prefix",
    "init_weights_seed": None,
    "prompt_init": "random_uniform",
    "prompt_init_text": None,
    "prompt_length": 5,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "seq_bn": _BOTTLENECK_DEFAULTS | {"original_ln_before": True},
    "double_seq_bn": _BOTTLENECK_DEFAULTS | {"mh_adapter": True, "non_linearity": "swish"},
    "par_bn": _BOTTLENECK_DEFAULTS | {"is_parallel": True, "scaling": 4.0, "init_weights": "mam_adapter"},
    "compacter": _BOTTLENECK_DEFAULTS | {"mh_adapter": True, "non_linearity": "gelu", "phm_layer": True},
    "lora": _LORA_DEFAULTS,
    "ia3": _LORA_DEFAULTS
    | {
        "alpha": 1,
        "attn_matrices": ["k", "v"],
        "composition_mode": "scale",
        "init_weights": "ia3",
        "intermediate_lora": True,
        "r": 1,
    },
    "prefix": _PREFIX_DEFAULTS,
    "prefix_flat": _PREFIX_DEFAULTS | {"flat": True},
    "mam": {
        "architecture": "union",
        "configs": [_PREFIX_DEFAULTS, _BOTTLENECK_DEFAULTS | {"is_parallel": True}],
    },
}
_REFT_DEFAULTS: dict[str, Any] = {
    "architecture": "reft",
    "dropout": 0.05,
    "dtype": None,
    "init_weights_seed": None,
    "layers": "all",
    "non_linearity": None,
    "orthogonality": True,
    "output_reft": True,
    "prefix_positions": 3,
    "r": 2,
    "suffix_positions": 0,
    "tied_weights": False,
}
ENCODER_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "prompt": _PROMPT_DEFAULTS,
    "seq_bn_inv": _BOTTLENECK_DEFAULTS
    | {"original_ln_before": True, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
    "loreft": _REFT_DEFAULTS,
    "noreft": _REFT_DEFAULTS | {"orthogonality": False, "subtract_projection": True, "suffix_positions": 2},
    "direft": _REFT_DEFAULTS
    | {"orthogonality": False, "subtract_projection": False, "non_linearity": "relu", "tied_weights": True},
    "unipelt": {
        "architecture": "union",
        "configs": [
            _PREFIX_DEFAULTS | {"use_gating": True},
            _BOTTLENECK_DEFAULTS | {"original_ln_before": True, "use_gating": True},
            _LORA_DEFAULTS | {"use_gating": True},
        ],
    },
    "prompt_after_bos": _PROMPT_DEFAULTS | {"combine": "prefix_after_bos"},
    "gated_seq_bn": _BOTTLENECK_DEFAULTS | {"original_ln_before": True, "use_gating": True},
    "gated_lora": _LORA_DEFAULTS | {"use_gating": True, "intermediate_lora": True, "output_lora": True},
    "gated_ia3": _LORA_DEFAULTS
    | {
        "alpha": 3,
        "attn_matrices": ["k", "v"],
        "composition_mode": "scale",
        "init_weights": "ia3",
        "intermediate_lora": True,
        "r": 1,
        "use_gating": True,
    },
    "gated_prefix": _PREFIX_DEFAULTS | {"use_gating": True},
    "gated_prefix_flat": _PREFIX_DEFAULTS | {"use_gating": True, "shared_gating": False, "flat": True},
}
"""Those that decoders do not have."""


def holder_path(base: BaseDescription, layer: int, sub_layer: str) -> str:
    """What the names of the tensors on a sub-layer's output begin with."""
    layers, holders = _LAYERS.get(base.model_type, ("layers", _ADAPTERS))
    return f"{base.prefix}{layers}.{layer}.{holders[sub_layer]}.adapters.{NAME}."


def adapterhub_config(base: BaseDescription, preset: str, **overrides: Any) -> dict[str, Any]:
    """A whole ``adapter_config.json``; ``overrides`` replace or add fields of the method's own config."""
    return {
        "config": dict(({**PRESETS, **ENCODER_PRESETS})[preset]) | overrides,
        "hidden_size": base.hidden_size,
        "model_class": "LlamaForCausalLM",
        "model_name": min(base.names, default=""),
        "model_type": base.model_type,
        "name": NAME,
        "version": VERSION,
    }


def adapterhub_tensors(
    base: BaseDescription, config: Mapping[str, Any], *, seed: int = 0, scale: float = 0.1
) -> dict[str, Tensor]:
    """Random tensors by the library's names, for a config of ``adapterhub_config``."""
    make = _Maker(seed, scale)
    inner = config["config"]
    return _tensors(base, inner, make)


def _tensors(base: BaseDescription, inner: Mapping[str, Any], make: _Maker) -> dict[str, Tensor]:
    architecture = inner.get("architecture")
    if architecture == "union":
        parts = [_tensors(base, each, make) for each in inner["configs"]]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if architecture == "lora":
        return _lora_tensors(base, inner, make)
    if architecture == "reft":
        return _reft_tensors(base, inner, make)
    if architecture == "prefix_tuning":
        return _prefix_tensors(base, inner, make)
    if architecture == "prompt_tuning":
        name = f"{base.prefix}prompt_tuning.prompt_tunings.{NAME}.prompt_embedding.weight"
        return {name: make(inner["prompt_length"], base.embedding_size)}
    return _bottleneck_tensors(base, inner, make)


def make_adapterhub(
    directory: Path,
    base: BaseDescription,
    preset: str = "seq_bn",
    *,
    seed: int = 0,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write an AdapterHub directory of random weights.

    Args:
        directory: made if it is missing.
        base: the model it fits; its first name is recorded.
        preset: a name in ``PRESETS`` or ``ENCODER_PRESETS``.
        seed: the same arguments and seed give the same bytes.
        scale: standard deviation of the weights.
        dtype: that the tensors are stored in.
        overrides: fields of the method's own config, such as ``ln_before=True``.

    Returns:
        ``directory``.
    """
    config = adapterhub_config(base, preset, **overrides)
    tensors = adapterhub_tensors(base, config, seed=seed, scale=scale)
    return write_adapterhub(directory, config, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def write_adapterhub(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write an AdapterHub directory of any config and tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(dict(tensors), directory / "adapter.safetensors")
    return directory


class _Maker:
    """Random tensors, one after another."""

    def __init__(self, seed: int, scale: float) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = scale

    def __call__(self, *shape: int, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(shape, generator=self._generator) * self._scale


def _layers(base: BaseDescription, leave_out: Collection[int]) -> list[int]:
    return [layer for layer in range(base.num_layers) if layer not in leave_out]


def _lora_tensors(base: BaseDescription, inner: Mapping[str, Any], make: _Maker) -> dict[str, Tensor]:
    names = [letter for letter in inner["attn_matrices"] if inner["selfattn_lora"]]
    names += [name for name in ("intermediate", "output") if inner[f"{name}_lora"]]
    layers, linears = (
        _LAYERS.get(base.model_type, ("layers",))[0],
        _LINEARS.get(base.model_type, _LLAMA_LINEARS),
    )
    tensors = {}
    for layer in _layers(base, inner["leave_out"]):
        for module in (linears[name] for name in names):
            path = f"{base.prefix}{layers}.{layer}.{module}"
            d_in, d_out = base.linears[base.modules[path][0].site.name]
            prefix = f"{path}.loras.{NAME}."
            if inner["composition_mode"] == "scale":
                tensors[prefix + "lora_B"] = make(d_out, 1, mean=1.0)
            else:
                tensors[prefix + "lora_A"] = make(inner["r"], d_in)
                tensors[prefix + "lora_B"] = make(d_out, inner["r"])
            if inner["use_gating"]:
                tensors |= {f"{prefix}gate.weight": make(1, d_in), f"{prefix}gate.bias": make(1)}
    return tensors


def _prefix_tensors(base: BaseDescription, inner: Mapping[str, Any], make: _Maker) -> dict[str, Tensor]:
    holder = "self" if base.model_type == "distilbert" else "self_prefix"
    prefix = f"{base.prefix}prefix_tuning.prefix_tunings.{NAME}.{holder}."
    columns = 2 * len(_layers(base, inner["leave_out"])) * base.num_kv_heads * base.head_dim
    gates: dict[str, Tensor] = {}
    for layer in _layers(base, []) if inner["use_gating"] else ():
        layers = _LAYERS.get(base.model_type, ("layers",))[0]
        module = f"{layers}.{layer}.{_ATTENTION.get(base.model_type, 'attention.self')}"
        gate, count = f"{base.prefix}{module}.prefix_tuning.prefix_gates.{NAME}.", 2 - inner["shared_gating"]
        gates |= {f"{gate}weight": make(count, base.hidden_size), f"{gate}bias": make(count)}
    if inner["flat"]:
        return gates | {prefix + "control_trans": make(inner["prefix_length"] * columns)}
    hidden = inner["bottleneck_size"]
    return gates | {
        prefix + "wte.weight": make(inner["prefix_length"], base.hidden_size, mean=0.3),
        prefix + "control_trans.0.weight": make(hidden, base.hidden_size),
        prefix + "control_trans.0.bias": make(hidden),
        prefix + "control_trans.2.weight": make(columns, hidden),
        prefix + "control_trans.2.bias": make(columns),
    }


def _bottleneck_tensors(base: BaseDescription, inner: Mapping[str, Any], make: _Maker) -> dict[str, Tensor]:
    hidden = base.hidden_size
    tensors: dict[str, Tensor] = {}
    for layer in _layers(base, inner["leave_out"]):
        for flag in ("mh_adapter", "output_adapter"):
            if inner[flag]:
                sub_layer = "attention" if flag == "mh_adapter" else "feed_forward"
                prefix = holder_path(base, layer, sub_layer)
                size = max(1, int(hidden // _factor(inner["reduction_factor"], layer)))
                tensors |= _block_tensors(inner, prefix, hidden, size, make)
    if inner["inv_adapter"]:
        tensors |= _coupling_tensors(base, inner, make)
    if inner["phm_layer"]:
        size = max(1, int(hidden // _factor(inner["reduction_factor"], 0)))
        tensors |= _shared_phm_tensors(base, inner, hidden, size, make)
    return tensors


def _coupling_tensors(base: BaseDescription, inner: Mapping[str, Any], make: _Maker) -> dict[str, Tensor]:
    first = base.embedding_size // 2
    second = base.embedding_size - first
    tensors: dict[str, Tensor] = {}
    for network, d_in, d_out in (("F", second, first), ("G", first, second)):
        prefix, size = (
            f"{base.prefix}invertible_adapters.{NAME}.{network}",
            int(d_in // inner["inv_adapter_reduction_factor"]),
        )
        tensors |= {f"{prefix}.0.weight": make(size, d_in), f"{prefix}.0.bias": make(size)}
        tensors |= {f"{prefix}.2.weight": make(d_out, size), f"{prefix}.2.bias": make(d_out)}
    return tensors


def _reft_tensors(base: BaseDescription, inner: Mapping[str, Any], make: _Maker) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    size, holder = base.hidden_size, _LAYERS.get(base.model_type, ("layers",))[0]
    inside = "albert_layers.0." if base.model_type == "albert" else ""
    layers = range(base.num_layers) if inner["layers"] == "all" else inner["layers"]
    units = range(1 if inner["tied_weights"] else 2)
    for layer, unit in product(layers, units):
        prefix = f"{base.prefix}{holder}.{layer}.{inside}reft_layer.refts.{NAME}.units.{unit}."
        tensors[f"{prefix}learned_source.weight"] = make(inner["r"], size)
        tensors[f"{prefix}learned_source.bias"] = make(inner["r"])
        if not inner["orthogonality"]:
            tensors[f"{prefix}projection.weight"] = make(inner["r"], size)
            continue
        # As torch keeps it: reflectors, with signs on the diagonal, and an orthogonal matrix.
        original = make(inner["r"], size)
        original.diagonal().copy_(torch.tensor([-1.0, 1.0]).repeat(inner["r"])[: inner["r"]])
        tensors[f"{prefix}projection.parametrizations.weight.original"] = original
        rotation = torch.linalg.qr(make(size, size))[0].contiguous()
        tensors[f"{prefix}projection.parametrizations.weight.0.base"] = rotation
    return tensors


def _factor(value: Any, layer: int) -> float:
    if not isinstance(value, dict):
        return float(value)
    return float(value[str(layer)] if str(layer) in value else value["default"])


def _block_tensors(
    inner: Mapping[str, Any], prefix: str, hidden: int, size: int, make: _Maker
) -> dict[str, Tensor]:
    down = f"{prefix}adapter_down.{1 if inner['ln_before'] else 0}."
    tensors: dict[str, Tensor] = {}
    for module, d_in, d_out in ((down, hidden, size), (f"{prefix}adapter_up.", size, hidden)):
        if inner["phm_layer"]:
            tensors |= _phm_tensors(inner, module, d_in, d_out, make)
        else:
            tensors |= {f"{module}weight": make(d_out, d_in), f"{module}bias": make(d_out)}
    for norm in ("before", "after"):
        if inner[f"ln_{norm}"]:
            tensors[f"{prefix}adapter_norm_{norm}.weight"] = make(hidden, mean=1.0)
            tensors[f"{prefix}adapter_norm_{norm}.bias"] = make(hidden)
    if inner["use_gating"]:
        tensors |= {f"{prefix}gate.weight": make(1, hidden), f"{prefix}gate.bias": make(1)}
    if inner["scaling"] in ("learned", "channel"):
        tensors[f"{prefix}scaling"] = make(1 if inner["scaling"] == "learned" else hidden, mean=1.0)
    return tensors


def _phm_tensors(
    inner: Mapping[str, Any], module: str, d_in: int, d_out: int, make: _Maker
) -> dict[str, Tensor]:
    tensors = {} if inner["shared_W_phm"] else _factors(inner, f"{module}W", d_in, d_out, make)
    if not inner["shared_phm_rule"]:
        tensors |= _rule(inner, f"{module}phm_rule", make)
    if inner["phm_bias"]:
        tensors[f"{module}b"] = make(d_out)
    return tensors


def _shared_phm_tensors(
    base: BaseDescription, inner: Mapping[str, Any], hidden: int, size: int, make: _Maker
) -> dict[str, Tensor]:
    prefix = f"{base.prefix}shared_parameters.{NAME}."
    tensors: dict[str, Tensor] = {}
    if inner["shared_W_phm"]:
        tensors |= _factors(inner, f"{prefix}W_down", hidden, size, make)
        tensors |= _factors(inner, f"{prefix}W_up", size, hidden, make)
    return tensors | (_rule(inner, f"{prefix}phm_rule", make) if inner["shared_phm_rule"] else {})


def _factors(inner: Mapping[str, Any], name: str, d_in: int, d_out: int, make: _Maker) -> dict[str, Tensor]:
    n, rank = inner["phm_dim"], inner["phm_rank"]
    if inner["factorized_phm_W"]:
        return {f"{name}_left": make(n, d_in // n, rank), f"{name}_right": make(n, rank, d_out // n)}
    return {name: make(n, d_in // n, d_out // n)}


def _rule(inner: Mapping[str, Any], name: str, make: _Maker) -> dict[str, Tensor]:
    n = inner["phm_dim"]
    if inner["factorized_phm_rule"]:
        return {f"{name}_left": make(n, n, 1, mean=1.0), f"{name}_right": make(n, 1, n, mean=1.0)}
    return {name: make(n, n, n, mean=1.0)}
