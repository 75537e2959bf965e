"""What the decoder must know of a model's architecture, free of any family's own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
"""Of the gated feed-forward: x · σ(x), or the tanh approximation of x · Φ(x)."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, resolved for one maximum context length; without frequencies nothing is rotated.

    ``angle[p, i] = p · inv_freq[i]``; cosines and sines are multiplied by ``attention_scaling``. The
    rotated part of a head is its first ``rotary_dim`` values, by halves (the Hugging Face layout).

    Attributes:
        inv_freq: radians per position, one per pair of rotated values.
        attention_scaling: dimensionless; 1 unless the kind of RoPE scales attention (yarn, longrope).

    Source: Su et al. 2021 (arXiv:2104.09864); kinds as in transformers' ``ROPE_INIT_FUNCTIONS``.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Values of a head that are rotated."""
        return 2 * len(self.inv_freq)


NO_ROPE = RopeConfig(inv_freq=())
"""Of layers that know nothing of positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One decoder of the Llama family and its relatives.

    Which linears have a bias, and which norms there are, is known from the weights.

    Attributes:
        model_type: Hugging Face ``model_type``, such as ``llama``.
        vocab_size: V.
        hidden_size: D.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: Hkv; H is a multiple of it.
        head_dim: K.
        intermediate_size: width of the gated feed-forward.
        norm_eps: added to the mean square in RMS norms.
        tie_word_embeddings: the output head is the embedding.
        rope: rotary embedding, right for every position below ``max_context_length``; the first layer's
            where they differ.
        sliding_window: per layer, how many of the latest positions a token attends to, itself
            counted; None is all of them.
        max_context_length: prompt and output tokens together, at most.
        attention_scale: multiplies the scores before the softmax; mostly 1 / √K.
        layer_ropes: per layer, where they differ; empty means ``rope`` everywhere.
        activation: of the feed-forward's gate.
        embedding_scale: multiplies the embeddings.
        residual_scale: multiplies a sub-layer's output before it is added to the residual stream.
        logit_divisor: divides the output head's results.
        attention_softcap: c in c · tanh(score / c), after ``attention_scale``; None for no cap.
        logit_softcap: the same of the logits, after ``logit_divisor``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    sliding_window: tuple[int | None, ...]
    max_context_length: int
    attention_scale: float
    layer_ropes: tuple[RopeConfig, ...] = ()
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embedding of each layer."""
        return self.layer_ropes or (self.rope,) * self.num_layers


def out_features(config: DecoderConfig) -> dict[str, int]:
    """Outputs of each linear of a layer."""
    keys = config.num_kv_heads * config.head_dim
    return {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": keys,
        "v_proj": keys,
        "o_proj": config.hidden_size,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "down_proj": config.hidden_size,
    }
