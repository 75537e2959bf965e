"""Gemma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.decoder import (
    LLAMA,
    NORMS_AFTER,
    QK_NORMS,
    Scales,
    Softcaps,
    decoder,
)
from manyhats.engine.model.families.fields import RawConfig, biased_groups, refuse, windows_of, with_defaults
from manyhats.engine.model.layout import Family, Layout
from manyhats.engine.model.rope import rope_parameters

_DEFAULTS: RawConfig = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_LAYOUT = replace(
    LLAMA,
    norms={
        **NORMS_AFTER,
        "attention_before": "input_layernorm",
        "feed_forward_before": "pre_feedforward_layernorm",
    },
    norm_offset=1.0,
    stores_embedding_scale=True,
)


def gemma(config: RawConfig, max_context_length: int | None) -> Family:
    """Gemma 1: Llama with norms of weight 1 + w, and embeddings times √D."""
    full = with_defaults(
        config,
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
    )
    refuse(full, "use_bidirectional_attention")
    # Its files say "gelu" where they mean the tanh form; transformers 4 read the other field, 5 does not.
    asked, other = (
        "gelu_pytorch_tanh" if value == "gelu" else value
        for value in (full["hidden_act"], full.get("hidden_activation") or full["hidden_act"])
    )
    if asked != other:
        raise ModelError(f"config.json: hidden_activation {other!r} is not hidden_act, which is {asked!r}")
    return decoder(
        {**full, "hidden_act": asked},
        max_context_length,
        layout=replace(LLAMA, norm_offset=1.0, stores_embedding_scale=True),
        biased=biased_groups(full, feed_forward=False),
        scales=Scales(embedding=full["hidden_size"] ** 0.5),
    )


def gemma2(config: RawConfig, max_context_length: int | None) -> Family:
    """Gemma 2: caps on scores and logits; every other layer slides, the first one too."""
    full = with_defaults(
        config,
        **_DEFAULTS,
        vocab_size=256000,
        max_position_embeddings=8192,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    return _gemma(
        full,
        max_context_length,
        layout=_LAYOUT,
        windows=windows_of(full, full["sliding_window"], lambda index: index % 2 == 0),
        attention_softcap=full["attn_logit_softcapping"],
    )


def gemma3_text(config: RawConfig, max_context_length: int | None) -> Family:
    """Gemma 3's text model: five layers in six slide, with their own RoPE; norms of queries and keys."""
    full = with_defaults(
        config,
        **_DEFAULTS,
        vocab_size=262208,
        max_position_embeddings=131072,
        final_logit_softcapping=None,
        sliding_window_pattern=6,
    )
    refuse(full, "attn_logit_softcapping")
    pattern = full["sliding_window_pattern"]
    # Which layers slide, whether or not any context reaches their window.
    slides = windows_of(full, 1, lambda index: (index + 1) % pattern != 0)
    wide, local = _gemma3_ropes(full)
    return _gemma(
        full,
        max_context_length,
        layout=replace(_LAYOUT, norms={**_LAYOUT.norms, **QK_NORMS}),
        windows=tuple(full["sliding_window"] if slide else None for slide in slides),
        ropes=tuple(local if slide else wide for slide in slides),
    )


def _gemma(
    full: RawConfig,
    max_context_length: int | None,
    *,
    layout: Layout,
    windows: Sequence[int | None],
    ropes: Sequence[RawConfig] | None = None,
    attention_softcap: float | None = None,
) -> Family:
    """What Gemma 2 and 3 share: norms around each sub-layer, of weight 1 + w; embeddings times √D."""
    refuse(full, "use_bidirectional_attention")
    return decoder(
        {**full, "hidden_act": full["hidden_activation"]},
        max_context_length,
        layout=layout,
        biased=biased_groups(full, feed_forward=False),
        windows=windows,
        ropes=ropes,
        scales=Scales(embedding=full["hidden_size"] ** 0.5, attention=full["query_pre_attn_scalar"] ** -0.5),
        softcaps=Softcaps(attention=attention_softcap, logits=full["final_logit_softcapping"]),
    )


def _gemma3_ropes(full: RawConfig) -> tuple[RawConfig, RawConfig]:
    """RoPE parameters for full and for sliding attention; older files have them in three separate fields."""
    given = full.get("rope_parameters") or {}
    if not set(given) <= {"full_attention", "sliding_attention"}:
        raise ModelError("config.json: gemma3_text needs rope_parameters by layer type")
    wide = {**(given.get("full_attention") or {}), **(full.get("rope_scaling") or {})}
    local = given.get("sliding_attention") or {}
    wide_theta = full.get("rope_theta") or 1_000_000.0
    local_theta = full.get("rope_local_base_freq") or 10_000.0
    return (
        rope_parameters({"rope_parameters": wide, "rope_theta": wide_theta}),
        rope_parameters({"rope_parameters": local, "rope_theta": local_theta}),
    )
