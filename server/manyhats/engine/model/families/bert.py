"""BERT and its kin: encoders whose stream is normed after every sub-layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import (
    Architecture,
    Around,
    Attention,
    Block,
    Embedding,
    FeedForward,
    Learned,
    Norm,
)
from manyhats.engine.model.families.decoder import check_config
from manyhats.engine.model.families.fields import RawConfig, check_heads_divide, refuse
from manyhats.engine.model.layout import Family, Layout, Stored

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_BERT = Layout(
    modules={
        "attention.self.query": Stored(("q_proj",)),
        "attention.self.key": Stored(("k_proj",)),
        "attention.self.value": Stored(("v_proj",)),
        "attention.output.dense": Stored(("o_proj",)),
        "intermediate.dense": Stored(("up_proj",)),
        "output.dense": Stored(("down_proj",)),
    },
    norms={"attention_stream": "attention.output.LayerNorm", "feed_forward_stream": "output.LayerNorm"},
    prefix="bert.",
    other_prefixes=("",),
    embedding="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    token_types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    embedding_projection="embeddings_project",
    pooler="{prefix}pooler.dense",
    layer="encoder.layer.{layer}",
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    unused=("cls.", "lm_head.", "discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
)
_DISTILBERT = replace(
    _BERT,
    modules={
        "attention.q_lin": Stored(("q_proj",)),
        "attention.k_lin": Stored(("k_proj",)),
        "attention.v_lin": Stored(("v_proj",)),
        "attention.out_lin": Stored(("o_proj",)),
        "ffn.lin1": Stored(("up_proj",)),
        "ffn.lin2": Stored(("down_proj",)),
    },
    norms={"attention_stream": "sa_layer_norm", "feed_forward_stream": "output_layer_norm"},
    prefix="distilbert.",
    token_types="",
    pooler="",
    layer="transformer.layer.{layer}",
    unused=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
_ALBERT = replace(
    _BERT,
    modules={
        "attention.query": Stored(("q_proj",)),
        "attention.key": Stored(("k_proj",)),
        "attention.value": Stored(("v_proj",)),
        "attention.dense": Stored(("o_proj",)),
        "ffn": Stored(("up_proj",)),
        "ffn_output": Stored(("down_proj",)),
    },
    norms={"attention_stream": "attention.LayerNorm", "feed_forward_stream": "full_layer_layer_norm"},
    prefix="albert.",
    embedding_projection="encoder.embedding_hidden_mapping_in",
    pooler="{prefix}pooler",
    layer="encoder.albert_layer_groups.{layer}.albert_layers.0",
    unused=("predictions.", "sop_classifier."),
)
_DEFAULTS: RawConfig = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def bert(config: RawConfig, max_context_length: int | None) -> Family:
    """BERT, and MiniLM of its shape."""
    return _encoder({**_DEFAULTS, **config}, max_context_length, _BERT)


def roberta(config: RawConfig, max_context_length: int | None) -> Family:
    """RoBERTa: positions begin behind the id of the padding."""
    return _roberta(config, max_context_length, 50265)


def xlm_roberta(config: RawConfig, max_context_length: int | None) -> Family:
    """XLM-R: RoBERTa in a hundred languages."""
    return _roberta(config, max_context_length, 30522)


def camembert(config: RawConfig, max_context_length: int | None) -> Family:
    """CamemBERT: RoBERTa in French."""
    return _roberta(config, max_context_length, 30522)


def _roberta(config: RawConfig, max_context_length: int | None, vocab_size: int) -> Family:
    full = {**_DEFAULTS, "vocab_size": vocab_size, "pad_token_id": 1, **config}
    layout = replace(_BERT, prefix="roberta.")
    return _encoder(full, max_context_length, layout, offset=full["pad_token_id"] + 1)


def distilbert(config: RawConfig, max_context_length: int | None) -> Family:
    """DistilBERT: no types of tokens."""
    full = {**_DEFAULTS, "num_hidden_layers": 6, **config, "type_vocab_size": 0, "layer_norm_eps": 1e-12}
    return _encoder(full, max_context_length, _DISTILBERT)


def electra(config: RawConfig, max_context_length: int | None) -> Family:
    """ELECTRA's discriminator: an embedding that may be narrower than the stream."""
    own = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "embedding_size": 128}
    full = {**_DEFAULTS, **own, **config}
    return _encoder(full, max_context_length, replace(_BERT, prefix="electra.", pooler=""))


def albert(config: RawConfig, max_context_length: int | None) -> Family:
    """ALBERT: layers that share their weights, all of them or group by group, and a narrow embedding."""
    own = {
        "vocab_size": 30000,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "embedding_size": 128,
        "hidden_act": "gelu_new",
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    }
    full = {**_DEFAULTS, **own, **config}
    num_layers, num_groups = full["num_hidden_layers"], full["num_hidden_groups"]
    if full["inner_group_num"] != 1:
        raise ModelError(f"config.json: inner_group_num {full['inner_group_num']!r} is not supported; 1 is")
    if full["embedding_size"] == full["hidden_size"]:
        raise ModelError("config.json: an embedding_size equal to hidden_size is not supported for albert")
    family = _encoder(full, max_context_length, _ALBERT)
    if not 1 <= num_groups <= num_layers:
        raise ModelError(f"config.json: num_hidden_groups {num_groups} is outside [1, {num_layers}]")
    shared = tuple(int(layer / (num_layers / num_groups)) for layer in range(num_layers))
    return replace(family, architecture=replace(family.architecture, shared=shared))


def _encoder(
    full: Mapping[str, Any], max_context_length: int | None, layout: Layout, *, offset: int = 0
) -> Family:
    refuse(full, "is_decoder", "add_cross_attention")
    if full.get("position_embedding_type", "absolute") != "absolute":
        kind = full["position_embedding_type"]
        raise ModelError(f"config.json: position_embedding_type {kind!r} is not supported; absolute is")
    activation = check_config(full)
    check_heads_divide(full)
    hidden, num_heads = full["hidden_size"], full["num_attention_heads"]
    longest = full["max_position_embeddings"] - offset
    length = longest if max_context_length is None else max_context_length
    if not 1 <= length <= longest:
        raise ModelError(f"max_context_length {length} is outside [1, {longest}], the model's own range")
    norm = Norm(float(full["layer_norm_eps"]), kind="layer", has_bias=True)
    head_dim = hidden // num_heads
    block = Block(
        hidden_size=hidden,
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=1.0 / math.sqrt(head_dim),
            sees_all=True,
        ),
        around_attention=Around(stream=norm),
        feed_forward=FeedForward(full["intermediate_size"], activation, is_gated=False),
        around_feed_forward=Around(stream=norm),
        biased=frozenset(_LINEARS),
    )
    architecture = Architecture(
        model_type=full["model_type"],
        max_context_length=length,
        embedding=Embedding(
            full["vocab_size"],
            full.get("embedding_size") or hidden,
            positions=Learned(full["max_position_embeddings"], offset),
            num_token_types=full["type_vocab_size"],
            norm=norm,
        ),
        blocks=(block,) * full["num_hidden_layers"],
        final_norm=None,
        head=None,
    )
    return Family(architecture, layout)
