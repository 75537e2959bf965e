"""OLMo."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.architecture import Norm
from manyhats.engine.model.families.decoder import LLAMA, NORMS_AFTER, QK_NORMS, Kind, decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, with_defaults
from manyhats.engine.model.layout import Family


def olmo2(config: RawConfig, max_context_length: int | None) -> Family:
    """OLMo 2: norms on the sub-layers' outputs only, and over all queries and all keys."""
    full = with_defaults(
        config, vocab_size=50304, intermediate_size=11008, max_position_embeddings=2048, rms_norm_eps=1e-5
    )
    return decoder(
        full,
        max_context_length,
        layout=replace(LLAMA, norms={**NORMS_AFTER, **QK_NORMS}),
        biased=biased_groups(full, feed_forward=False),
        kind=Kind(qk_norm=Norm(full["rms_norm_eps"], "row")),
    )
