"""GPT-NeoX, with Pythia, and Falcon: queries, keys and values in one matrix, head by head."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.architecture import Norm
from manyhats.engine.model.families.decoder import Kind, decoder
from manyhats.engine.model.families.fields import ALL_HEADS, RawConfig, refuse, with_defaults
from manyhats.engine.model.layout import Family, Layout, Stored

_QKV = ("q_proj", "k_proj", "v_proj")
_TWO_NORMS = {"attention_before": "input_layernorm", "feed_forward_before": "post_attention_layernorm"}
_NEOX = Layout(
    modules={
        "attention.query_key_value": Stored(_QKV, rows="heads"),
        "attention.dense": Stored(("o_proj",)),
        "mlp.dense_h_to_4h": Stored(("up_proj",)),
        "mlp.dense_4h_to_h": Stored(("down_proj",)),
    },
    norms=_TWO_NORMS,
    prefix="gpt_neox.",
    other_prefixes=("",),
    embedding="embed_in",
    final_norm="final_layer_norm",
    other_heads=("embed_out",),
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)
_FALCON = Layout(
    modules={
        "self_attention.query_key_value": Stored(_QKV, rows="groups"),
        "self_attention.dense": Stored(("o_proj",)),
        "mlp.dense_h_to_4h": Stored(("up_proj",)),
        "mlp.dense_4h_to_h": Stored(("down_proj",)),
    },
    norms=_TWO_NORMS,
    prefix="transformer.",
    other_prefixes=("",),
    embedding="word_embeddings",
    final_norm="ln_f",
    layer="h.{layer}",
    ignored=("rotary_emb.inv_freq",),
)


def gpt_neox(config: RawConfig, max_context_length: int | None) -> Family:
    """GPT-NeoX and Pythia: the feed-forward runs beside the attention, each with a norm of its own."""
    full = with_defaults(
        {"attention_bias": True, **config},
        vocab_size=50432,
        hidden_size=6144,
        num_hidden_layers=44,
        num_attention_heads=64,
        intermediate_size=24576,
        max_position_embeddings=2048,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        use_parallel_residual=True,
        partial_rotary_factor=0.25,
    )
    full |= ALL_HEADS
    return decoder(
        full,
        max_context_length,
        kind=Kind(
            norm=Norm(full["layer_norm_eps"], kind="layer", has_bias=True),
            is_gated=False,
            is_parallel=bool(full["use_parallel_residual"]),
        ),
        layout=_NEOX,
        biased=(*(("qkv", "o") if full["attention_bias"] else ()), "up", "down"),
        rotates_part=True,
    )


def falcon(config: RawConfig, max_context_length: int | None) -> Family:
    """Falcon with rotary positions: one or few heads of keys; the feed-forward beside the attention, or behind it."""
    full = with_defaults(
        config,
        vocab_size=65024,
        hidden_size=4544,
        num_attention_heads=71,
        num_kv_heads=None,
        intermediate_size=None,
        max_position_embeddings=2048,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        bias=False,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        num_ln_in_parallel_attn=None,
        tie_word_embeddings=True,
    )
    refuse(full, "alibi")
    full |= {**ALL_HEADS, "intermediate_size": full["intermediate_size"] or 4 * full["hidden_size"]}
    is_new = bool(full["new_decoder_architecture"])
    own_kv_heads = full["num_kv_heads"] or full["num_attention_heads"]
    full["num_key_value_heads"] = (
        own_kv_heads if is_new else 1 if full["multi_query"] else full["num_attention_heads"]
    )
    is_parallel = bool(is_new or full["parallel_attn"])
    return decoder(
        full,
        max_context_length,
        kind=Kind(
            norm=Norm(full["layer_norm_eps"], kind="layer", has_bias=True),
            is_gated=False,
            is_parallel=is_parallel,
        ),
        layout=replace(_FALCON, norms=_falcon_norms(full, is_new)),
        biased=("qkv", "o", "up", "down") if full["bias"] else (),
    )


def _falcon_norms(full: RawConfig, is_new: bool) -> dict[str, str]:
    """The paths of a block's norms."""
    count = full["num_ln_in_parallel_attn"]
    if not full["parallel_attn"]:
        refuse(
            {**full, "new_decoder_architecture without parallel_attn": is_new},
            "new_decoder_architecture without parallel_attn",
        )
        return _TWO_NORMS
    if is_new and count in (None, 2):
        return {"attention_before": "ln_attn", "feed_forward_before": "ln_mlp"}
    refuse({**full, "num_ln_in_parallel_attn": count if count == 2 else None}, "num_ln_in_parallel_attn")
    return {"attention_before": "input_layernorm"}
