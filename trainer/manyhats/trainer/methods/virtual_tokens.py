"""What prefix tuning, prompt tuning and P-tuning share: P virtual tokens before the sequence."""

from __future__ import annotations

from typing import Any

from manyhats.adapters.limits import AdapterLimits
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import SettingError


def check_num_virtual_tokens(num_virtual_tokens: int, model: LoadedModel, limits: AdapterLimits) -> None:
    """Check P against the base's context and the server's limit.

    Raises:
        SettingError: it is too large.
    """
    length = model.architecture.max_context_length
    if num_virtual_tokens >= length:
        raise SettingError(
            "num_virtual_tokens", f"is {num_virtual_tokens}, which leaves none of the base's {length} tokens"
        )
    check_virtual_token_limit(num_virtual_tokens, limits)


def check_virtual_token_limit(num_virtual_tokens: int, limits: AdapterLimits) -> None:
    """Check P against the server's limit, whatever the base.

    Raises:
        SettingError: it is too large.
    """
    if num_virtual_tokens > limits.max_virtual_tokens:
        raise SettingError(
            "num_virtual_tokens", f"is {num_virtual_tokens}; the limit is {limits.max_virtual_tokens}"
        )


def prompt_fields(num_virtual_tokens: int, model: LoadedModel) -> dict[str, Any]:
    """PEFT's ``PromptLearningConfig`` for virtual tokens that are embeddings, [P, E]."""
    return {
        "num_attention_heads": model.architecture.attention.num_heads,
        "num_layers": model.architecture.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": num_virtual_tokens,
        "token_dim": model.architecture.embedding.size,
    }
