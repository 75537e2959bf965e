"""A tiny checkpoint that says the tokens it is told to, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint, save_tokenizer


def make_saying_checkpoint(
    directory: Path, token_ids: Sequence[int], tokenizer: Tokenizer | None = None, **config: Any
) -> Path:
    """Save a Llama whose most likely tokens are ``token_ids``, over and over.

    Args:
        directory: created if need be.
        token_ids: each once; the first also follows every token that is not among them.
        tokenizer: saved beside it.
        config: fields of ``tokenizer_config.json``.
    """
    make_checkpoint(
        directory,
        hidden_size=TINY_VOCAB_SIZE,
        num_layers=1,
        intermediate_size=16,
        max_position_embeddings=1024,
    )
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "layers" in name and "norm" not in name:
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
    # Token t is the unit vector t from end to end, and the head has one entry in the row of what follows t.
    weights["model.embed_tokens.weight"] = torch.eye(TINY_VOCAB_SIZE)
    head = torch.zeros(TINY_VOCAB_SIZE, TINY_VOCAB_SIZE)
    following = dict(zip(token_ids, [*token_ids[1:], token_ids[0]], strict=True))
    for token_id in range(TINY_VOCAB_SIZE):
        head[following.get(token_id, token_ids[0]), token_id] = 1.0
    weights["lm_head.weight"] = head
    save_file(weights, path, metadata={"format": "pt"})
    save_tokenizer(directory, tokenizer, **config)
    return directory
