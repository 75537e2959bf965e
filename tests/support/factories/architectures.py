"""Architectures for tests of what runs beneath a whole model."""

from __future__ import annotations

from manyhats.engine.model.architecture import (
    Architecture,
    Around,
    Attention,
    Block,
    Embedding,
    FeedForward,
    Head,
    Norm,
    Rope,
)


def make_architecture(
    attention: Attention,
    *,
    num_layers: int = 1,
    hidden_size: int = 64,
    width: int = 64,
    vocab_size: int = 8,
    max_context_length: int = 64,
) -> Architecture:
    """One Llama-like block, several times."""
    norm = Norm(1e-5)
    block = Block(
        hidden_size=hidden_size,
        attention=attention,
        around_attention=Around(before=norm),
        feed_forward=FeedForward(width, "silu"),
        around_feed_forward=Around(before=norm),
    )
    return Architecture(
        model_type="llama",
        max_context_length=max_context_length,
        embedding=Embedding(vocab_size, hidden_size),
        blocks=(block,) * num_layers,
        final_norm=norm,
        head=Head(is_tied=False, size=hidden_size),
    )


def make_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, *, scale: float = 1.0, rotary_dim: int = 0
) -> Attention:
    """Attention that rotates the first values of a head."""
    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        rope=Rope(tuple(0.7**i for i in range(rotary_dim // 2))) if rotary_dim else None,
    )
