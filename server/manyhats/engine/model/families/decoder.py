"""What all decoders share, from Llama, whose kind is the default, to those that descend from GPT-2."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from manyhats.adapters.activations import ALIASES
from manyhats.engine.errors import ModelError
from manyhats.engine.model.architecture import (
    Architecture,
    Around,
    Attention,
    Block,
    Embedding,
    Experts,
    FeedForward,
    Head,
    Learned,
    Norm,
)
from manyhats.engine.model.families.fields import RawConfig
from manyhats.engine.model.layout import Family, Layout, Stored
from manyhats.engine.model.rope import RopeSource, resolve_rope, rope_parameters, rope_source

NORMS_BEFORE: Mapping[str, str] = {
    "attention_before": "input_layernorm",
    "feed_forward_before": "post_attention_layernorm",
}
NORMS_AFTER: Mapping[str, str] = {
    "attention_output": "post_attention_layernorm",
    "feed_forward_output": "post_feedforward_layernorm",
}
QK_NORMS: Mapping[str, str] = {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}
"""Name of a block's norm → its path below the layer; similarly for the two before."""

LLAMA = Layout(
    modules={
        "self_attn.q_proj": Stored(("q_proj",)),
        "self_attn.k_proj": Stored(("k_proj",)),
        "self_attn.v_proj": Stored(("v_proj",)),
        "self_attn.o_proj": Stored(("o_proj",)),
        "mlp.gate_proj": Stored(("gate_proj",)),
        "mlp.up_proj": Stored(("up_proj",)),
        "mlp.down_proj": Stored(("down_proj",)),
    },
    norms=NORMS_BEFORE,
    other_prefixes=("",),
)

_FUNCTIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu")
_ACTIVATIONS = {
    **{name: name for name in _FUNCTIONS},
    **{alias: name for alias, name in ALIASES.items() if name in _FUNCTIONS},
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Factors of embeddings, attention scores (None is 1 / √head_dim) and sub-layers' outputs; the logits' divisor."""

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logit_divisor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Softcaps:
    """Caps of attention scores and of logits; None for none."""

    attention: float | None = None
    logits: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a family's blocks and ends are made of.

    Attributes:
        norm: of the stream; None for an RMS norm with the config's eps.
        qk_norm: of queries and keys; None for the same as ``norm``, over each head.
        is_gated: of the feed-forward.
        is_parallel: whether the feed-forward runs beside the attention.
        embedding_size: E; None for D.
        positions: learned ones; None for none.
        feed_forwards: of each layer, its width and experts; None for the config's ``intermediate_size`` in all.
        has_final_norm: whether the stream is normed at its end.
        has_head_bias: of the output head.
    """

    norm: Norm | None = None
    qk_norm: Norm | None = None
    is_gated: bool = True
    is_parallel: bool = False
    embedding_size: int | None = None
    positions: Learned | None = None
    feed_forwards: tuple[tuple[int, Experts | None], ...] | None = None
    has_final_norm: bool = True
    has_head_bias: bool = False


LLAMA_KIND = Kind()


def decoder(
    full: RawConfig,
    max_context_length: int | None,
    *,
    kind: Kind = LLAMA_KIND,
    layout: Layout = LLAMA,
    biased: Collection[str] = (),
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[RawConfig | None] | None = None,
    rotates_part: bool = False,
    scales: Scales = Scales(),
    softcaps: Softcaps = Softcaps(),
) -> Family:
    """A decoder, Llama's kind except for the arguments.

    Args:
        full: the config with a family's defaults.
        max_context_length: prompt and output tokens together; None for the model's own maximum.
        kind: what it is made of.
        layout: has paths for the norms that exist.
        biased: groups of linears that have a bias.
        windows: per layer, the sliding window; None for none.
        ropes: per layer, the RoPE's parameters, None for a layer without; by default the same in all of them.
        rotates_part: whether ``partial_rotary_factor`` is supported.
        scales, softcaps: if they are not Llama's.

    Raises:
        ModelError: an activation, kind of RoPE, count or context length that is not supported.
    """
    num_layers, activation = full["num_hidden_layers"], check_config(full)
    num_heads, num_kv_heads, head_dim = _heads(full)
    parameters = (rope_parameters(full),) * num_layers if ropes is None else ropes
    sources = _rope_sources(full, parameters, head_dim, rotates_part)
    length = _context_length(full, sources, max_context_length)
    norm = Norm(float(full["rms_norm_eps"])) if kind.norm is None else kind.norm
    of_heads = replace(norm, span="head") if kind.qk_norm is None else kind.qk_norm
    norms = {name: of_heads if name in QK_NORMS else norm for name in layout.norms}
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=float(1.0 / math.sqrt(head_dim) if scales.attention is None else scales.attention),
        softcap=softcaps.attention,
        query_norm=norms.get("query"),
        key_norm=norms.get("key"),
    )
    block = Block(
        hidden_size=full["hidden_size"],
        attention=attention,
        around_attention=_around("attention", norms),
        feed_forward=FeedForward(full["intermediate_size"], activation, kind.is_gated),
        around_feed_forward=_around("feed_forward", norms),
        residual_scale=float(scales.residual),
        is_parallel=kind.is_parallel,
    )
    names = (name for group in block.groups() if group.name in biased for name in group.names)
    block = replace(block, biased=frozenset(names))
    size = full["hidden_size"] if kind.embedding_size is None else kind.embedding_size
    architecture = Architecture(
        model_type=full["model_type"],
        max_context_length=length,
        embedding=Embedding(full["vocab_size"], size, float(scales.embedding), kind.positions),
        blocks=_stack(block, sources, windows, length, kind.feed_forwards),
        final_norm=norm if kind.has_final_norm else None,
        head=Head(
            is_tied=bool(full["tie_word_embeddings"]),
            size=size,
            has_bias=kind.has_head_bias,
            divisor=float(scales.logit_divisor),
            softcap=softcaps.logits,
        ),
    )
    return Family(architecture, layout)


def _around(sublayer: str, norms: Mapping[str, Norm]) -> Around:
    return Around(*(norms.get(f"{sublayer}_{place}") for place in ("before", "output", "stream")))


def check_config(full: RawConfig) -> str:
    """The name of a config's activation; refuses unsupported ones, and impossible counts."""
    activation = full["hidden_act"]
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ModelError(f"config.json: hidden_act {activation!r} is not supported; these are: {known}")
    for name in _COUNTS:
        if not isinstance(full[name], int) or full[name] < 1:
            raise ModelError(f"config.json: {name} must be a positive integer, not {full[name]!r}")
    return _ACTIVATIONS[activation]


def _heads(full: RawConfig) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, and their size."""
    num_heads = full["num_attention_heads"]
    num_kv_heads = full["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_kv_heads} key-value heads do not divide {num_heads} heads")
    return num_heads, num_kv_heads, full.get("head_dim") or full["hidden_size"] // num_heads


def _rope_sources(
    full: RawConfig, parameters: Sequence[RawConfig | None], head_dim: int, rotates_part: bool
) -> list[RopeSource | None]:
    """The RoPE of each layer; None for a layer without."""
    return [
        None if each is None else rope_source(full, each, head_dim=head_dim, allows_partial=rotates_part)
        for each in parameters
    ]


def _context_length(full: RawConfig, sources: Sequence[RopeSource | None], asked: int | None) -> int:
    """Prompt and output tokens together: what was asked for, if all layers' RoPE hold for it."""
    own: int = full["max_position_embeddings"]
    limit = min((source.context_limit() for source in sources if source is not None), default=own)
    length = own if asked is None else asked
    if not 1 <= length <= limit:
        raise ModelError(f"max_context_length {length} is outside [1, {limit}], the model's own range")
    return length


def _stack(
    block: Block,
    sources: Sequence[RopeSource | None],
    windows: Sequence[int | None] | None,
    length: int,
    feed_forwards: Sequence[tuple[int, Experts | None]] | None,
) -> tuple[Block, ...]:
    """The block in each layer, with the layer's RoPE, window, and feed-forward."""
    ropes = [None if source is None else resolve_rope(source, length) for source in sources]
    windows = (None,) * len(sources) if windows is None else windows
    # A window that no context reaches is no window; saying so lets the kernels skip it.
    reached = [window if window is not None and window < length else None for window in windows]
    own = block.feed_forward
    inner = [(own.width, own.experts)] * len(sources) if feed_forwards is None else feed_forwards
    return tuple(
        replace(
            block,
            attention=replace(block.attention, rope=rope, window=window),
            feed_forward=replace(own, width=width, experts=experts),
        )
        for rope, window, (width, experts) in zip(ropes, reached, inner, strict=True)
    )
