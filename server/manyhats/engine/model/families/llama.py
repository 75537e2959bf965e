"""Llama and Mistral."""

from __future__ import annotations

from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.decoder import decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, with_defaults
from manyhats.engine.model.layout import Family


def llama(config: RawConfig, max_context_length: int | None) -> Family:
    """Llama 1 to 3, SmolLM2 and others of their shape: no windows, biases if the config says so."""
    full = with_defaults(config, vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048)
    return decoder(full, max_context_length, biased=biased_groups(full))


def mistral(config: RawConfig, max_context_length: int | None) -> Family:
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
    windows = (full["sliding_window"],) * full["num_hidden_layers"]
    return decoder(full, max_context_length, windows=windows)
