"""What the decoder must know of a model's architecture, free of any family's own names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, resolved for one maximum context length.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One decoder of the Llama family. Whether a linear has a bias is known from the weights.

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
        rope: rotary embedding, right for every position below ``max_context_length``.
        sliding_window: per layer, how many of the latest positions a token attends to, itself
            counted; None is all of them.
        max_context_length: prompt and output tokens together, at most.
        attention_scale: multiplies the scores before the softmax; 1 / √K.
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
