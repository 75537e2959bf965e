"""Model families: from a Hugging Face ``config.json`` to our decoder's configuration.

One small function per family says what is special about it. The defaults are those of transformers' config
classes, written out here because importing those takes seconds; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.adapters.sites import BaseDescription, Site
from manyhats.engine.errors import ModelError
from manyhats.engine.model.config import DecoderConfig
from manyhats.engine.model.rope import resolve_rope, rope_source

RawConfig = Mapping[str, Any]
"""A parsed ``config.json``."""

LINEAR_MODULES: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Site name → module path below a layer; the same in every family."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One checkpoint's decoder, and which of its linears have a bias."""

    decoder: DecoderConfig
    biased: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a family makes of a config beyond the common fields; ``config`` has the defaults filled in."""

    config: RawConfig
    biased: frozenset[str]
    windows: tuple[int | None, ...]


_COMMON_DEFAULTS: RawConfig = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _with_defaults(config: RawConfig, **defaults: Any) -> dict[str, Any]:
    return {**_COMMON_DEFAULTS, **defaults, **config}


def _llama(config: RawConfig) -> _Traits:
    """Llama 1 to 3, SmolLM2 and others of their shape: no windows, biases where the config says so."""
    full = _with_defaults(
        config,
        vocab_size=32000,
        intermediate_size=11008,
        max_position_embeddings=2048,
        num_key_value_heads=None,
        attention_bias=False,
        mlp_bias=False,
    )
    biased = (_ATTENTION if full["attention_bias"] else ()) + (_FEED_FORWARD if full["mlp_bias"] else ())
    return _Traits(full, frozenset(biased), (None,) * full["num_hidden_layers"])


def _mistral(config: RawConfig) -> _Traits:
    """Mistral: one window for all layers; the config class has 4096 unless the file says otherwise."""
    full = _with_defaults(
        config,
        vocab_size=32000,
        intermediate_size=14336,
        max_position_embeddings=4096 * 32,
        num_key_value_heads=8,
        sliding_window=4096,
    )
    if "full_attention" in set(full.get("layer_types") or ()):
        raise ModelError("config.json: mistral with layer_types is ministral, which is not supported")
    return _Traits(full, frozenset(), (full["sliding_window"],) * full["num_hidden_layers"])


def _qwen2(config: RawConfig) -> _Traits:
    """Qwen2 and 2.5: biases on q, k and v; a window in some layers if ``use_sliding_window``."""
    full = _with_defaults(
        config,
        vocab_size=151936,
        intermediate_size=22016,
        max_position_embeddings=32768,
        num_key_value_heads=32,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
        layer_types=None,
    )
    num_layers = full["num_hidden_layers"]
    window = full["sliding_window"] if full["use_sliding_window"] else None
    if full["layer_types"] is None:
        slides = [window is not None and i >= full["max_window_layers"] for i in range(num_layers)]
    else:
        slides = [kind == "sliding_attention" for kind in full["layer_types"]]
    if len(slides) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(slides)} entries for {num_layers} layers")
    windows = tuple(window if s else None for s in slides)
    return _Traits(full, frozenset(("q_proj", "k_proj", "v_proj")), windows)


FAMILIES: Mapping[str, Callable[[RawConfig], _Traits]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
}
"""``model_type`` → its function."""


def read_architecture(config: RawConfig, max_context_length: int | None = None) -> Architecture:
    """The decoder that a ``config.json`` describes.

    Args:
        config: the parsed file.
        max_context_length: prompt and output tokens together; None takes the model's own maximum.

    Raises:
        ModelError: a model type, activation, kind of RoPE or context length that is not supported; the
            message names what is.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"config.json: model_type {model_type!r} is not supported; these are: {known}")
    traits = FAMILIES[model_type](config)
    _check(traits.config)
    try:
        decoder = _decoder_config(model_type, traits, max_context_length)
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json: a field has the wrong type or is 0: {error}") from error
    return Architecture(decoder=decoder, biased=traits.biased)


def _check(config: RawConfig) -> None:
    """Refuse what the decoder does not do, and counts that cannot be."""
    if config["hidden_act"] not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; silu is")
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ModelError(f"config.json: {name} must be a positive integer, not {config[name]!r}")


def _decoder_config(model_type: str, traits: _Traits, max_context_length: int | None) -> DecoderConfig:
    config = traits.config
    num_heads = config["num_attention_heads"]
    num_kv_heads = config["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_kv_heads} key-value heads do not divide {num_heads} heads")
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    source = rope_source(config, head_dim=head_dim)
    limit = source.context_limit()
    length = config["max_position_embeddings"] if max_context_length is None else max_context_length
    if not 1 <= length <= limit:
        raise ModelError(f"max_context_length {length} is outside [1, {limit}], the model's own range")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config["intermediate_size"],
        norm_eps=float(config["rms_norm_eps"]),
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        rope=resolve_rope(source, length),
        # A window that no context reaches is no window; saying so lets the kernels skip it.
        sliding_window=tuple(w if w is not None and w < length else None for w in traits.windows),
        max_context_length=length,
        attention_scale=1.0 / math.sqrt(head_dim),
    )


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Site name → (in, out) features of each linear of a layer."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key),
        "v_proj": (hidden, key),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def module_path(layer: int, name: str) -> str:
    """Hugging Face's path of a linear, such as ``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{LINEAR_MODULES[name]}"


def describe(config: DecoderConfig, *, names: Iterable[str], digest: str) -> BaseDescription:
    """What adapters are checked against: every linear of every layer is a site."""
    sites = {
        module_path(layer, name): Site(layer, name)
        for layer in range(config.num_layers)
        for name in LINEAR_MODULES
    }
    return BaseDescription(
        model_type=config.model_type,
        names=frozenset(names),
        digest=digest,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        linears=linear_shapes(config),
        modules=sites,
    )
