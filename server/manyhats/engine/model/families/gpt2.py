"""GPT-2, GPT-J and StarCoder2."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.architecture import Learned, Norm
from manyhats.engine.model.families.decoder import Kind, Scales, decoder
from manyhats.engine.model.families.fields import ALL_HEADS, RawConfig, refuse, with_defaults
from manyhats.engine.model.layout import Family, Layout, Stored
from manyhats.engine.model.rope import rope_parameters

_GROUPS = ("qkv", "o", "up", "down")
_GPT2 = Layout(
    modules={
        "attn.c_attn": Stored(("q_proj", "k_proj", "v_proj"), is_transposed=True),
        "attn.c_proj": Stored(("o_proj",), is_transposed=True),
        "mlp.c_fc": Stored(("up_proj",), is_transposed=True),
        "mlp.c_proj": Stored(("down_proj",), is_transposed=True),
    },
    norms={"attention_before": "ln_1", "feed_forward_before": "ln_2"},
    prefix="transformer.",
    other_prefixes=("",),
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    layer="h.{layer}",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
_GPTJ = Layout(
    modules={
        "attn.q_proj": Stored(("q_proj",)),
        "attn.k_proj": Stored(("k_proj",)),
        "attn.v_proj": Stored(("v_proj",)),
        "attn.out_proj": Stored(("o_proj",)),
        "mlp.fc_in": Stored(("up_proj",)),
        "mlp.fc_out": Stored(("down_proj",)),
    },
    norms={"attention_before": "ln_1"},
    is_interleaved=True,
    prefix="transformer.",
    other_prefixes=("",),
    embedding="wte",
    final_norm="ln_f",
    layer="h.{layer}",
    ignored=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)
_STARCODER2 = Layout(
    modules={
        "self_attn.q_proj": Stored(("q_proj",)),
        "self_attn.k_proj": Stored(("k_proj",)),
        "self_attn.v_proj": Stored(("v_proj",)),
        "self_attn.o_proj": Stored(("o_proj",)),
        "mlp.c_fc": Stored(("up_proj",)),
        "mlp.c_proj": Stored(("down_proj",)),
    },
    norms={"attention_before": "input_layernorm", "feed_forward_before": "post_attention_layernorm"},
    other_prefixes=("",),
)


def gpt2(config: RawConfig, max_context_length: int | None) -> Family:
    """GPT-2: learned positions, a norm before each sub-layer, matrices stored as [in, out]."""
    full = with_defaults(
        config,
        vocab_size=50257,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        intermediate_size=None,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        tie_word_embeddings=True,
        scale_attn_weights=True,
    )
    refuse(full, "add_cross_attention")
    full |= {**ALL_HEADS, "intermediate_size": full["intermediate_size"] or 4 * full["hidden_size"]}
    family = decoder(
        full,
        max_context_length,
        kind=Kind(
            norm=Norm(full["layer_norm_eps"], kind="layer", has_bias=True),
            is_gated=False,
            positions=Learned(full["max_position_embeddings"]),
        ),
        layout=_GPT2,
        biased=_GROUPS,
        ropes=(None,) * full["num_hidden_layers"],
        scales=Scales(attention=None if full["scale_attn_weights"] else 1.0),
    )
    return _scaled_by_layer(family) if full.get("scale_attn_by_inverse_layer_idx") else family


def _scaled_by_layer(family: Family) -> Family:
    """Attention scores of layer i divided by i + 1."""
    blocks = tuple(
        replace(block, attention=replace(block.attention, scale=block.attention.scale / (layer + 1)))
        for layer, block in enumerate(family.architecture.blocks)
    )
    return replace(family, architecture=replace(family.architecture, blocks=blocks))


def gptj(config: RawConfig, max_context_length: int | None) -> Family:
    """GPT-J: neighbouring values of a head's beginning are rotated; the feed-forward shares the attention's norm."""
    full = with_defaults(
        config,
        vocab_size=50400,
        num_hidden_layers=28,
        num_attention_heads=16,
        max_position_embeddings=2048,
        rotary_dim=64,
        intermediate_size=None,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
    )
    full |= {**ALL_HEADS, "intermediate_size": full["intermediate_size"] or 4 * full["hidden_size"]}
    head_dim = full["hidden_size"] // full["num_attention_heads"]
    rope = {**rope_parameters({}), "partial_rotary_factor": full["rotary_dim"] / head_dim}
    return decoder(
        full,
        max_context_length,
        kind=Kind(
            norm=Norm(full["layer_norm_eps"], kind="layer", has_bias=True),
            is_gated=False,
            is_parallel=True,
            has_head_bias=True,
        ),
        layout=_GPTJ,
        biased=("up", "down"),
        ropes=(rope,) * full["num_hidden_layers"],
        rotates_part=True,
    )


def starcoder2(config: RawConfig, max_context_length: int | None) -> Family:
    """StarCoder2: GPT-2's norms and feed-forward with Llama's attention, and a window in every layer, if any."""
    full = with_defaults(
        config,
        vocab_size=49152,
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=30,
        num_attention_heads=24,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        sliding_window=None,
        use_bias=True,
        tie_word_embeddings=True,
    )
    return decoder(
        full,
        max_context_length,
        kind=Kind(norm=Norm(full["layer_norm_eps"], kind="layer", has_bias=True), is_gated=False),
        layout=_STARCODER2,
        biased=_GROUPS if full["use_bias"] else (),
        windows=(full["sliding_window"],) * full["num_hidden_layers"],
    )
