"""Cohere's Command R."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from manyhats.engine.model.architecture import Norm
from manyhats.engine.model.families.decoder import LLAMA, QK_NORMS, Kind, Scales, decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, windows_of, with_defaults
from manyhats.engine.model.layout import Family
from manyhats.engine.model.rope import rope_parameters

_DEFAULTS: RawConfig = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "logit_scale": 0.0625,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_qk_norm": False,
}


def cohere(config: RawConfig, max_context_length: int | None) -> Family:
    """Command R: neighbouring values are rotated; each head of queries and of keys may have a norm of its own."""
    full = with_defaults(config, **_DEFAULTS)
    if "rope_parameters" not in config and "rope_theta" not in config:
        full["rope_theta"] = 500_000.0
    return _cohere(full, max_context_length)


def cohere2(config: RawConfig, max_context_length: int | None) -> Family:
    """Command R7B and later: every fourth layer sees all positions, and without rotation; the others slide."""
    full = with_defaults(config, **_DEFAULTS, sliding_window=4096, sliding_window_pattern=4, head_dim=128)
    pattern = full["sliding_window_pattern"]
    # Which layers slide, whether or not any context reaches their window.
    slides = windows_of(full, 1, lambda index: (index + 1) % pattern != 0)
    rope = rope_parameters(full)
    return _cohere(
        {**full, "use_qk_norm": False},
        max_context_length,
        windows=tuple(full["sliding_window"] if slide else None for slide in slides),
        ropes=tuple(rope if slide else None for slide in slides),
    )


def _cohere(
    full: RawConfig,
    max_context_length: int | None,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RawConfig | None] | None = None,
) -> Family:
    norm = Norm(full["layer_norm_eps"], kind="layer")
    norms = {"attention_before": "input_layernorm", **(QK_NORMS if full["use_qk_norm"] else {})}
    return decoder(
        full,
        max_context_length,
        kind=Kind(norm=norm, qk_norm=replace(norm, span="own_head"), is_parallel=True),
        layout=replace(LLAMA, norms=norms, is_interleaved=True),
        biased=biased_groups(full, feed_forward=False),
        windows=windows,
        ropes=ropes,
        scales=Scales(logit_divisor=1.0 / full["logit_scale"]),
    )
