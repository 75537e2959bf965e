"""SmolLM."""

from __future__ import annotations

from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.decoder import decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, windows_of, with_defaults
from manyhats.engine.model.layout import Family
from manyhats.engine.model.rope import rope_parameters


def smollm3(config: RawConfig, max_context_length: int | None) -> Family:
    """SmolLM3: every fourth layer has no RoPE, and is the one that slides if any does."""
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
    return decoder(
        full,
        max_context_length,
        biased=biased_groups(full),
        windows=windows_of(full, window, lambda index: not rotates[index]),
        ropes=tuple(rope if rotates[index] else None for index in range(num_layers)),
    )
