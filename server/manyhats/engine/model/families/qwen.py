"""Qwen."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.model.families.decoder import LLAMA, NORMS_BEFORE, QK_NORMS, decoder
from manyhats.engine.model.families.fields import RawConfig, biased_groups, windows_of, with_defaults
from manyhats.engine.model.layout import Family

_DEFAULTS: RawConfig = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen2(config: RawConfig, max_context_length: int | None) -> Family:
    """Qwen2 and 2.5: biases on q, k and v; a window in some layers if ``use_sliding_window``."""
    full = with_defaults(config, **_DEFAULTS)
    return decoder(full, max_context_length, biased=("qkv",), windows=_windows(full))


def qwen3(config: RawConfig, max_context_length: int | None) -> Family:
    """Qwen3 (dense): a norm of each head's queries and keys."""
    full = with_defaults(config, **_DEFAULTS, head_dim=128)
    return decoder(
        full,
        max_context_length,
        layout=replace(LLAMA, norms={**NORMS_BEFORE, **QK_NORMS}),
        biased=biased_groups(full, feed_forward=False),
        windows=_windows(full),
    )


def _windows(full: RawConfig) -> tuple[int | None, ...]:
    window = full["sliding_window"] if full["use_sliding_window"] else None
    return windows_of(full, window, lambda index: window is not None and index >= full["max_window_layers"])
