"""Granite."""

from __future__ import annotations

from manyhats.engine.model.families.decoder import Scales, decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, with_defaults
from manyhats.engine.model.layout import Family


def granite(config: RawConfig, max_context_length: int | None) -> Family:
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
    return decoder(
        full,
        max_context_length,
        biased=biased_groups(full),
        scales=Scales(
            embedding=full["embedding_multiplier"],
            attention=full["attention_multiplier"],
            residual=full["residual_multiplier"],
            logit_divisor=full["logits_scaling"],
        ),
    )
