"""OPT."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.architecture import Learned, Norm
from manyhats.engine.model.families.decoder import Kind, decoder
from manyhats.engine.model.families.fields import ALL_HEADS, RawConfig, with_defaults
from manyhats.engine.model.layout import Family, Layout, Stored

_OFFSET = 2
"""Rows of the table of positions before that of position 0."""
_OPT = Layout(
    modules={
        "self_attn.q_proj": Stored(("q_proj",)),
        "self_attn.k_proj": Stored(("k_proj",)),
        "self_attn.v_proj": Stored(("v_proj",)),
        "self_attn.out_proj": Stored(("o_proj",)),
        "fc1": Stored(("up_proj",)),
        "fc2": Stored(("down_proj",)),
    },
    norms={"attention_before": "self_attn_layer_norm", "feed_forward_before": "final_layer_norm"},
    prefix="model.decoder.",
    other_prefixes=("decoder.",),
    positions="embed_positions",
    embedding_projection="project_in",
    head_projection="project_out",
    final_norm="final_layer_norm",
    ignored=(),
)


def opt(config: RawConfig, max_context_length: int | None) -> Family:
    """OPT: learned positions; norms before the sub-layers or, in the 350m model, of the stream after each."""
    full = with_defaults(
        config,
        vocab_size=50272,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=2048,
        hidden_act="relu",
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        word_embed_proj_dim=None,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        tie_word_embeddings=True,
    )
    full |= ALL_HEADS
    is_before, has_weights = full["do_layer_norm_before"], bool(full["layer_norm_elementwise_affine"])
    place = "before" if is_before else "stream"
    norms = {name.replace("before", place): path for name, path in _OPT.norms.items()}
    return decoder(
        full,
        max_context_length,
        kind=Kind(
            norm=Norm(1e-5, kind="layer", has_weight=has_weights, has_bias=has_weights),
            is_gated=False,
            embedding_size=full["word_embed_proj_dim"] or full["hidden_size"],
            positions=Learned(full["max_position_embeddings"] + _OFFSET, _OFFSET),
            has_final_norm=bool(is_before and not full["_remove_final_layer_norm"]),
        ),
        layout=replace(_OPT, norms=norms),
        biased=("qkv", "o", "up", "down") if full["enable_bias"] else (),
        ropes=(None,) * full["num_hidden_layers"],
    )
