"""What sets one model family apart from another, and helpers for the functions that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from manyhats.engine.errors import ModelError

RawConfig = Mapping[str, Any]
"""A parsed ``config.json``."""

SEPARATE_MODULES: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("q_proj",),
    "self_attn.k_proj": ("k_proj",),
    "self_attn.v_proj": ("v_proj",),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_proj": ("gate_proj",),
    "mlp.up_proj": ("up_proj",),
    "mlp.down_proj": ("down_proj",),
}
"""Path of a stored matrix below its layer → the linears it holds, in row order: one each."""

FUSED_MODULES: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}
"""The same where matrices over one input are stored as one."""

NORMS_BEFORE: Mapping[str, str] = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}
NORMS_AFTER: Mapping[str, str] = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
NORMS_AROUND: Mapping[str, str] = {
    **NORMS_AFTER,
    "input_norm": "input_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
}
QK_NORMS: Mapping[str, str] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
"""Field of ``LayerWeights`` → path of the norm below its layer; the four before likewise."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a family makes of a config beyond the common fields.

    Attributes:
        config: the file, with the defaults filled in.
        windows: per layer, the sliding window; None for none.
        biased: the linears that have a bias.
        modules: path of a stored matrix below its layer → the linears it holds, in row order.
        norms: field of ``LayerWeights`` → path of the norm below its layer.
        norm_offset: what a stored norm weight lacks of the factor it stands for.
        norms_whole_projection: whether the norms of queries and keys go over all heads at once.
        ropes: per layer, the RoPE's parameters, None for a layer without; empty for the same in all of them.
        rotates_part: whether ``partial_rotary_factor`` is understood.
        activation: of the feed-forward's gate, by the name the config has for it.
        attention_scale: None for 1 / √head_dim.
        embedding_scale: multiplies the embeddings.
        stores_embedding_scale: whether that factor is rounded to the embedding's dtype first.
        residual_scale: multiplies sub-layer outputs.
        logit_divisor: divides the logits.
        attention_softcap: of scores; None for none.
        logit_softcap: of logits; None for none.
    """

    config: RawConfig
    windows: tuple[int | None, ...]
    biased: frozenset[str] = frozenset()
    modules: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    norm_offset: float = 0.0
    norms_whole_projection: bool = False
    ropes: tuple[RawConfig | None, ...] = ()
    rotates_part: bool = False
    activation: str
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    stores_embedding_scale: bool = False
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None


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


def with_defaults(config: RawConfig, **defaults: Any) -> dict[str, Any]:
    """A config with a family's defaults, and the common ones, for the fields it leaves out."""
    return {**_COMMON_DEFAULTS, **defaults, **config}


def traits_of(full: RawConfig, **special: Any) -> Traits:
    """Traits of a family that is like Llama but for what is named."""
    common: dict[str, Any] = {
        "windows": (None,) * full["num_hidden_layers"],
        "modules": SEPARATE_MODULES,
        "norms": NORMS_BEFORE,
        "activation": full["hidden_act"],
    }
    return Traits(config=full, **{**common, **special})


def biases(full: RawConfig, *, feed_forward: bool = True) -> frozenset[str]:
    """The linears with a bias where the config decides; ``feed_forward`` is whether it does for those too."""
    attention = _ATTENTION if full["attention_bias"] else ()
    return frozenset(attention + (_FEED_FORWARD if feed_forward and full["mlp_bias"] else ()))


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
