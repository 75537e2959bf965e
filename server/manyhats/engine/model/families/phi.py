"""Phi."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.architecture import Norm
from manyhats.engine.model.families.decoder import LLAMA, Kind, decoder
from manyhats.engine.model.families.fields import RawConfig, with_defaults
from manyhats.engine.model.layout import Family, Layout, Stored
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

_PHI = Layout(
    modules={
        "self_attn.q_proj": Stored(("q_proj",)),
        "self_attn.k_proj": Stored(("k_proj",)),
        "self_attn.v_proj": Stored(("v_proj",)),
        "self_attn.dense": Stored(("o_proj",)),
        "mlp.fc1": Stored(("up_proj",)),
        "mlp.fc2": Stored(("down_proj",)),
    },
    norms={"attention_before": "input_layernorm"},
    other_prefixes=("",),
    final_norm="final_layernorm",
)
_PHI_QK_NORMS = {"query": "self_attn.q_layernorm", "key": "self_attn.k_layernorm"}


def phi(config: RawConfig, max_context_length: int | None) -> Family:
    """Phi-1, 1.5 and 2: the beginning of each head is rotated; the feed-forward shares the attention's norm."""
    full = with_defaults(
        config,
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        max_position_embeddings=2048,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        qk_layernorm=False,
    )
    norms = {**_PHI.norms, **(_PHI_QK_NORMS if full["qk_layernorm"] else {})}
    return decoder(
        full,
        max_context_length,
        kind=Kind(
            norm=Norm(full["layer_norm_eps"], kind="layer", has_bias=True),
            is_gated=False,
            is_parallel=True,
            has_head_bias=True,
        ),
        layout=replace(_PHI, norms=norms),
        biased=("qkv", "o", "up", "down"),
        rotates_part=True,
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
    return decoder(
        full,
        max_context_length,
        layout=_LAYOUT,
        windows=(full["sliding_window"],) * full["num_hidden_layers"],
        ropes=(rope,) * full["num_hidden_layers"],
        rotates_part=True,
    )
