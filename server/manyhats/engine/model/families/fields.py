"""Reading the fields of a ``config.json``, common to all families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from manyhats.engine.errors import ModelError

RawConfig = Mapping[str, Any]
"""A parsed ``config.json``."""

_GPT_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}
OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "distilbert": {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
    },
    "falcon": {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    "gpt2": _GPT_NAMES,
    "gpt_neox": {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    "gptj": _GPT_NAMES,
    "mixtral": {"num_local_experts": "num_experts"},
    "opt": {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "starcoder2": {"norm_epsilon": "layer_norm_eps"},
}
"""``model_type`` → what its files call a field → what that is called elsewhere."""

_COMMON_DEFAULTS: RawConfig = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def standard_names(config: RawConfig) -> RawConfig:
    """A config with the names that most families have for its fields."""
    names = OWN_NAMES.get(str(config.get("model_type")), {})
    return {names.get(name, name): value for name, value in config.items()}


def with_defaults(config: RawConfig, **defaults: Any) -> dict[str, Any]:
    """A config with a family's defaults, and the common ones, for the fields it leaves out."""
    return {**_COMMON_DEFAULTS, **defaults, **config}


ALL_HEADS: RawConfig = {"num_key_value_heads": None, "head_dim": None}
"""What a family's files cannot ask for whose heads all have their own keys, and the size that is left to each."""


def check_heads_divide(full: RawConfig) -> None:
    """Refuse a hidden size that is no whole number of heads."""
    hidden, num_heads = full["hidden_size"], full["num_attention_heads"]
    if hidden % num_heads:
        raise ModelError(f"config.json: {num_heads} heads do not divide a hidden_size of {hidden}")


def biased_groups(full: RawConfig, *, feed_forward: bool = True) -> tuple[str, ...]:
    """Groups of linears that have a bias by the config; ``feed_forward`` is whether it decides for those too."""
    attention = ("qkv", "o") if full["attention_bias"] else ()
    return attention + (("gate_up", "down") if feed_forward and full["mlp_bias"] else ())


def windows_of(
    full: RawConfig, window: int | None, default_slides: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Each layer's window: ``layer_types`` says which layers slide, or else ``default_slides`` of the index."""
    num_layers = full["num_hidden_layers"]
    kinds = full.get("layer_types")
    if kinds is None:
        slides = [default_slides(index) for index in range(num_layers)]
    else:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ModelError(f"config.json: layer_types names {unknown[0]!r}, which is not supported")
        slides = [kind == "sliding_attention" for kind in kinds]
    if len(slides) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(slides)} entries for {num_layers} layers")
    return tuple(window if slide else None for slide in slides)


def refuse(full: RawConfig, *names: str) -> None:
    """Refuse options that would change what the model computes."""
    for name in names:
        if full.get(name):
            raise ModelError(f"config.json: {name} {full[name]!r} is not supported for {full['model_type']}")
