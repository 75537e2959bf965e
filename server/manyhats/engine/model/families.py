"""From a Hugging Face ``config.json`` to our decoder's configuration, and how the checkpoint stores its weights.

What sets the families apart stands in ``known_families``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from manyhats.adapters.sites import BaseDescription, Site, TextCheck, WeightSource
from manyhats.engine.errors import ModelError
from manyhats.engine.model.config import NO_ROPE, Activation, DecoderConfig
from manyhats.engine.model.known_families import FAMILIES
from manyhats.engine.model.rope import RopeSource, resolve_rope, rope_parameters, rope_source
from manyhats.engine.model.traits import SEPARATE_MODULES, RawConfig, Traits

EMBEDDING_MODULE = "model.embed_tokens"
HEAD_MODULE = "lm_head"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One checkpoint's decoder, and how its weights are stored.

    Attributes:
        decoder: what the weights are assembled for; its ``embedding_scale`` is the unrounded one.
        biased: names of the linears that have a bias.
        modules: path of a stored matrix below its layer → the linears it holds, in row order.
        norms: field of ``LayerWeights`` → path of the norm below its layer.
        norm_offset: added to every stored norm weight.
        norms_whole_projection: the norms of queries and keys go over all heads at once.
        stores_embedding_scale: whether the embedding's multiplier is rounded to the embedding's dtype.
    """

    decoder: DecoderConfig
    biased: frozenset[str]
    modules: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    norm_offset: float = 0.0
    norms_whole_projection: bool = False
    stores_embedding_scale: bool = False

    def decoder_at(self, dtype: torch.dtype) -> DecoderConfig:
        """The decoder over an embedding of that dtype."""
        if not self.stores_embedding_scale:
            return self.decoder
        scale = torch.tensor(self.decoder.embedding_scale).to(dtype)
        return replace(self.decoder, embedding_scale=float(scale))


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


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
        hint = "; of gemma3 the text model alone, gemma3_text, is" if model_type == "gemma3" else ""
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"config.json: model_type {model_type!r} is not supported{hint}; these are: {known}")
    try:
        traits = FAMILIES[model_type](config)
        _check(traits)
        decoder = _decoder_config(model_type, traits, max_context_length)
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json: a field has the wrong type or is 0: {error}") from error
    return Architecture(
        decoder=decoder,
        biased=traits.biased,
        modules=traits.modules,
        norms=traits.norms,
        norm_offset=traits.norm_offset,
        norms_whole_projection=traits.norms_whole_projection,
        stores_embedding_scale=traits.stores_embedding_scale,
    )


def _check(traits: Traits) -> None:
    """Refuse what the decoder does not do, and counts that cannot be."""
    config = traits.config
    if traits.activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ModelError(
            f"config.json: hidden_act {traits.activation!r} is not supported; these are: {known}"
        )
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


def _decoder_config(model_type: str, traits: Traits, max_context_length: int | None) -> DecoderConfig:
    config = traits.config
    num_heads = config["num_attention_heads"]
    num_kv_heads = config["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_kv_heads} key-value heads do not divide {num_heads} heads")
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    sources = _rope_sources(traits, head_dim)
    length = _context_length(config, sources, max_context_length)
    ropes = tuple(NO_ROPE if source is None else resolve_rope(source, length) for source in sources)
    scale = 1.0 / math.sqrt(head_dim) if traits.attention_scale is None else traits.attention_scale
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
        rope=ropes[0],
        layer_ropes=ropes if len(set(ropes)) > 1 else (),
        # A window that no context reaches is no window; saying so lets the kernels skip it.
        sliding_window=tuple(w if w is not None and w < length else None for w in traits.windows),
        max_context_length=length,
        attention_scale=float(scale),
        activation=_ACTIVATIONS[traits.activation],
        embedding_scale=float(traits.embedding_scale),
        residual_scale=float(traits.residual_scale),
        logit_divisor=float(traits.logit_divisor),
        attention_softcap=traits.attention_softcap,
        logit_softcap=traits.logit_softcap,
    )


def _rope_sources(traits: Traits, head_dim: int) -> tuple[RopeSource | None, ...]:
    """The RoPE of each layer; None for a layer without."""
    config = traits.config
    parameters = traits.ropes or (rope_parameters(config),) * config["num_hidden_layers"]
    return tuple(
        None
        if of_layer is None
        else rope_source(config, of_layer, head_dim=head_dim, allows_partial=traits.rotates_part)
        for of_layer in parameters
    )


def _context_length(config: RawConfig, sources: tuple[RopeSource | None, ...], asked: int | None) -> int:
    """Prompt and output tokens together: what was asked for, if all layers' RoPE hold for it."""
    own: int = config["max_position_embeddings"]
    limit = min((source.context_limit() for source in sources if source is not None), default=own)
    length = own if asked is None else asked
    if not 1 <= length <= limit:
        raise ModelError(f"max_context_length {length} is outside [1, {limit}], the model's own range")
    return length


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


def layer_path(layer: int, name: str) -> str:
    """Hugging Face's path of what lies ``name`` below a layer, such as ``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{name}"


def describe(
    config: DecoderConfig,
    *,
    names: Iterable[str],
    digest: str,
    modules: Mapping[str, tuple[str, ...]] = SEPARATE_MODULES,
    weights: WeightSource | None = None,
    check_text: TextCheck | None = None,
) -> BaseDescription:
    """What adapters are checked against: every linear of every layer is a site, and embedding and head are.

    Args:
        config: the decoder.
        names: every name this base is known by.
        digest: of weights and quantization.
        modules: path of a module below its layer → the linears it holds, in row order.
        weights: the base's own; None where only its description is at hand.
        check_text: tells what an adapter's text files mean on this base.
    """
    sites: dict[str, Site] = {EMBEDDING_MODULE: Site(-1, "embed_tokens"), HEAD_MODULE: Site(-1, "lm_head")}
    fused: dict[str, tuple[Site, ...]] = {}
    for layer in range(config.num_layers):
        for path, parts in modules.items():
            at = tuple(Site(layer, name) for name in parts)
            if len(at) == 1:
                sites[layer_path(layer, path)] = at[0]
            else:
                fused[layer_path(layer, path)] = at
    return BaseDescription(
        model_type=config.model_type,
        names=frozenset(names),
        digest=digest,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        linears=linear_shapes(config),
        modules=sites,
        fused_modules=fused,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        embedding_scale=config.embedding_scale,
        is_tied=config.tie_word_embeddings,
        has_sliding_window=any(window is not None for window in config.sliding_window),
        weights=weights,
        check_text=check_text,
    )
