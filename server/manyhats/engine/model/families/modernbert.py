"""ModernBERT: an encoder of Llama's kind, whose layers see a window to either side of a token, but for every third."""

from __future__ import annotations

from dataclasses import replace

from manyhats.adapters.heads import Pooling
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import Norm, Pooler
from manyhats.engine.model.families.decoder import Kind, decoder
from manyhats.engine.model.families.fields import (
    ALL_HEADS,
    RawConfig,
    biased_groups,
    check_heads_divide,
    windows_of,
    with_defaults,
)
from manyhats.engine.model.layout import Family, Layout, Stored
from manyhats.engine.model.rope import rope_parameters

_LAYOUT = Layout(
    modules={
        "attn.Wqkv": Stored(("q_proj", "k_proj", "v_proj")),
        "attn.Wo": Stored(("o_proj",)),
        "mlp.Wi": Stored(("gate_proj", "up_proj")),
        "mlp.Wo": Stored(("down_proj",)),
    },
    norms={"attention_before": "attn_norm", "feed_forward_before": "mlp_norm"},
    other_prefixes=("",),
    embedding="embeddings.tok_embeddings",
    embedding_norm="embeddings.norm",
    final_norm="final_norm",
    pooler="head.dense",
    pooler_norm="head.norm",
    unused=("decoder.",),
)
_POOLINGS = {"cls": Pooling.FIRST, "mean": Pooling.MEAN}


def modernbert(config: RawConfig, max_context_length: int | None) -> Family:
    """ModernBERT: norms before sub-layers, a gate, two rotations; what is in front of its classifiers is normed too."""
    full = with_defaults(
        config,
        vocab_size=50368,
        hidden_size=768,
        intermediate_size=1152,
        num_hidden_layers=22,
        num_attention_heads=12,
        max_position_embeddings=8192,
        hidden_activation="gelu",
        norm_eps=1e-5,
        norm_bias=False,
        local_attention=128,
        global_attn_every_n_layers=3,
        global_rope_theta=160_000.0,
        local_rope_theta=10_000.0,
        classifier_bias=False,
        classifier_pooling="cls",
        classifier_activation="gelu",
    )
    full |= {**ALL_HEADS, "hidden_act": full["hidden_activation"]}
    check_heads_divide(full)
    every, norm = (
        full["global_attn_every_n_layers"],
        Norm(full["norm_eps"], "row", "layer", True, full["norm_bias"]),
    )
    # Which layers slide, whether or not any text reaches their window.
    slides = windows_of(full, 1, lambda index: index % every != 0)
    wide, local = _rope(full, "full_attention", "global"), _rope(full, "sliding_attention", "local")
    family = decoder(
        full,
        max_context_length,
        kind=Kind(norm=norm),
        layout=_LAYOUT,
        biased=biased_groups(full),
        windows=tuple(_window(full) if slide else None for slide in slides),
        ropes=tuple(local if slide else wide for slide in slides),
    )
    return _encoder(family, norm, Pooler(_classifier_pooling(full), bool(full["classifier_bias"]), norm))


def _encoder(family: Family, norm: Norm, pooler: Pooler) -> Family:
    """The same blocks seeing both ways, without a head; the first one's attention reads the normed embeddings."""
    architecture = family.architecture
    blocks = [
        replace(block, attention=replace(block.attention, sees_all=True)) for block in architecture.blocks
    ]
    blocks[0] = replace(blocks[0], around_attention=replace(blocks[0].around_attention, before=None))
    embedding = replace(architecture.embedding, norm=norm)
    architecture = replace(architecture, embedding=embedding, blocks=tuple(blocks), head=None, pooler=pooler)
    return replace(family, architecture=architecture)


def _window(full: RawConfig) -> int:
    """Positions that a token sees up to itself, and from itself on: half of ``local_attention`` without it."""
    if full["local_attention"] < 0:
        raise ModelError(f"config.json: local_attention must be at least 0, not {full['local_attention']}")
    return int(full["local_attention"] // 2 + 1)


def _rope(full: RawConfig, kind: str, name: str) -> RawConfig:
    """RoPE parameters of one kind of layers; older files have them in fields of their own."""
    given = full.get("rope_parameters") or {}
    if not set(given) <= {"full_attention", "sliding_attention"}:
        raise ModelError("config.json: modernbert needs rope_parameters by layer type")
    parameters = {**(given.get(kind) or {}), **(full.get("rope_scaling") or {})}
    return rope_parameters({"rope_parameters": parameters, "rope_theta": float(full[f"{name}_rope_theta"])})


def _classifier_pooling(full: RawConfig) -> Pooling:
    """What rows of a text its classifiers read."""
    pooling, activation = full["classifier_pooling"], full["classifier_activation"]
    if pooling not in _POOLINGS:
        raise ModelError(f"config.json: classifier_pooling {pooling!r} is not one of {', '.join(_POOLINGS)}")
    if activation != "gelu":
        raise ModelError(f"config.json: classifier_activation {activation!r} is not supported; gelu is")
    return _POOLINGS[pooling]
