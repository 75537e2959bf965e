"""The model families that are served: for each a small function that says what sets it apart.

The defaults are those of transformers' config classes, written out here because importing those takes seconds;
a test compares the two. What each function says was read from the family's modeling file in transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from manyhats.engine.errors import ModelError
from manyhats.engine.model.rope import rope_parameters
from manyhats.engine.model.traits import (
    FUSED_MODULES,
    NORMS_AFTER,
    NORMS_AROUND,
    NORMS_BEFORE,
    QK_NORMS,
    RawConfig,
    Traits,
    biases,
    refuse,
    traits_of,
    windows_of,
    with_defaults,
)


def _llama(config: RawConfig) -> Traits:
    """Llama 1 to 3, SmolLM2 and others of their shape: no windows, biases where the config says so."""
    full = with_defaults(config, vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048)
    return traits_of(full, biased=biases(full))


def _mistral(config: RawConfig) -> Traits:
    """Mistral: one window for all layers; the config class has 4096 unless the file says otherwise."""
    full = with_defaults(
        config,
        vocab_size=32000,
        intermediate_size=14336,
        max_position_embeddings=4096 * 32,
        num_key_value_heads=8,
        sliding_window=4096,
    )
    if "full_attention" in set(full.get("layer_types") or ()):
        raise ModelError("config.json: mistral with layer_types is ministral, which is not supported")
    return traits_of(full, windows=(full["sliding_window"],) * full["num_hidden_layers"])


def _qwen_windows(full: RawConfig) -> tuple[int | None, ...]:
    window = full["sliding_window"] if full["use_sliding_window"] else None
    return windows_of(full, window, lambda index: window is not None and index >= full["max_window_layers"])


_QWEN_DEFAULTS: RawConfig = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _qwen2(config: RawConfig) -> Traits:
    """Qwen2 and 2.5: biases on q, k and v; a window in some layers if ``use_sliding_window``."""
    full = with_defaults(config, **_QWEN_DEFAULTS)
    return traits_of(full, biased=frozenset(("q_proj", "k_proj", "v_proj")), windows=_qwen_windows(full))


def _qwen3(config: RawConfig) -> Traits:
    """Qwen3 (dense): a norm of each head's queries and keys."""
    full = with_defaults(config, **_QWEN_DEFAULTS, head_dim=128)
    return traits_of(
        full,
        biased=biases(full, feed_forward=False),
        windows=_qwen_windows(full),
        norms={**NORMS_BEFORE, **QK_NORMS},
    )


_GEMMA_DEFAULTS: RawConfig = {
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


def _gemma(full: RawConfig, **special: object) -> Traits:
    """What Gemma 2 and 3 share: norms around each sub-layer, of weight 1 + w; embeddings times √D."""
    refuse(full, "use_bidirectional_attention")
    return traits_of(
        full,
        biased=biases(full, feed_forward=False),
        norm_offset=1.0,
        activation=full["hidden_activation"],
        attention_scale=full["query_pre_attn_scalar"] ** -0.5,
        embedding_scale=full["hidden_size"] ** 0.5,
        stores_embedding_scale=True,
        logit_softcap=full["final_logit_softcapping"],
        **special,
    )


def _gemma2(config: RawConfig) -> Traits:
    """Gemma 2: caps on scores and logits; every other layer slides, the first one too."""
    full = with_defaults(
        config,
        **_GEMMA_DEFAULTS,
        vocab_size=256000,
        max_position_embeddings=8192,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    return _gemma(
        full,
        windows=windows_of(full, full["sliding_window"], lambda index: index % 2 == 0),
        norms=NORMS_AROUND,
        attention_softcap=full["attn_logit_softcapping"],
    )


def _gemma3_text(config: RawConfig) -> Traits:
    """Gemma 3's text model: five layers in six slide, with a RoPE of their own; norms of queries and keys."""
    full = with_defaults(
        config,
        **_GEMMA_DEFAULTS,
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
        windows=tuple(full["sliding_window"] if slide else None for slide in slides),
        norms={**NORMS_AROUND, **QK_NORMS},
        ropes=tuple(local if slide else wide for slide in slides),
    )


def _gemma3_ropes(full: RawConfig) -> tuple[RawConfig, RawConfig]:
    """Parameters for full and for sliding attention; older files have them in three fields of their own."""
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


def _phi3(config: RawConfig) -> Traits:
    """Phi-3, 3.5 and 4: fused projections, longrope, and a RoPE that may leave part of a head as it is."""
    full = with_defaults(
        config,
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    rope = rope_parameters(full)
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # older names that this family has for it
        rope["rope_type"] = "longrope"
    return traits_of(
        full,
        windows=(full["sliding_window"],) * full["num_hidden_layers"],
        modules=FUSED_MODULES,
        ropes=(rope,) * full["num_hidden_layers"],
        rotates_part=True,
    )


def _granite(config: RawConfig) -> Traits:
    """Granite 3 (dense): Llama with four multipliers."""
    full = with_defaults(
        config,
        vocab_size=32000,
        intermediate_size=11008,
        max_position_embeddings=2048,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        attention_multiplier=1.0,
    )
    return traits_of(
        full,
        biased=biases(full),
        attention_scale=full["attention_multiplier"],
        embedding_scale=full["embedding_multiplier"],
        residual_scale=full["residual_multiplier"],
        logit_divisor=full["logits_scaling"],
    )


def _olmo2(config: RawConfig) -> Traits:
    """OLMo 2: norms on the sub-layers' outputs only, and over all queries and all keys."""
    full = with_defaults(
        config, vocab_size=50304, intermediate_size=11008, max_position_embeddings=2048, rms_norm_eps=1e-5
    )
    return traits_of(
        full,
        biased=biases(full, feed_forward=False),
        norms={**NORMS_AFTER, **QK_NORMS},
        norms_whole_projection=True,
    )


def _smollm3(config: RawConfig) -> Traits:
    """SmolLM3: every fourth layer has no RoPE, and is the one that slides where any does."""
    full = with_defaults(
        config,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2_000_000.0,
        use_sliding_window=False,
        sliding_window=None,
        no_rope_layer_interval=4,
        tie_word_embeddings=True,
    )
    num_layers, interval = full["num_hidden_layers"], full["no_rope_layer_interval"]
    rotates = full.get("no_rope_layers") or [(index + 1) % interval != 0 for index in range(num_layers)]
    if len(rotates) < num_layers:
        raise ModelError(f"config.json: no_rope_layers has {len(rotates)} entries for {num_layers} layers")
    window = full["sliding_window"] if full["use_sliding_window"] else None
    if window is None and "sliding_attention" in (full.get("layer_types") or ()):
        raise ModelError(
            "config.json: layer_types names sliding_attention, but use_sliding_window is not set"
        )
    rope = rope_parameters(full)
    return traits_of(
        full,
        biased=biases(full),
        windows=windows_of(full, window, lambda index: not rotates[index]),
        ropes=tuple(rope if rotates[index] else None for index in range(num_layers)),
    )


FAMILIES: Mapping[str, Callable[[RawConfig], Traits]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "granite": _granite,
    "llama": _llama,
    "mistral": _mistral,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
"""``model_type`` → its function."""
