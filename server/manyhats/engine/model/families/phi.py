"""Phi-3."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.families.fields import RawConfig, with_defaults
from manyhats.engine.model.families.llama_like import LLAMA, llama_like
from manyhats.engine.model.layout import Family, Stored
from manyhats.engine.model.rope import rope_parameters

_LAYOUT = replace(
    LLAMA,
    modules={
        "self_attn.qkv_proj": Stored(("q_proj", "k_proj", "v_proj")),
        "self_attn.o_proj": Stored(("o_proj",)),
        "mlp.gate_up_proj": Stored(("gate_proj", "up_proj")),
        "mlp.down_proj": Stored(("down_proj",)),
    },
)


def phi3(config: RawConfig, max_context_length: int | None) -> Family:
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
    return llama_like(
        full,
        max_context_length,
        layout=_LAYOUT,
        windows=(full["sliding_window"],) * full["num_hidden_layers"],
        ropes=(rope,) * full["num_hidden_layers"],
        rotates_part=True,
    )
