"""``python -m benchmarks.random_model DIR SHAPE``: a Llama of random weights, with the default model's tokenizer.

SHAPE is a JSON object with hidden_size, num_layers, num_heads, num_kv_heads and intermediate_size. It is a process of
its own, so that whoever measures others stays small.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

_DEFAULT_MODEL = "smollm2-135m-instruct"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_VOCAB_SIZE = 49152
_CONTEXT = 2048


def save(directory: Path, shape: dict[str, Any]) -> None:
    """Write config, bfloat16 weights and tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from manyhats.engine.checkpoints.fetch import fetch_model
    from manyhats.engine.home import default_home

    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        intermediate_size=shape["intermediate_size"],
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    fetched = fetch_model(_DEFAULT_MODEL, default_home())
    for name in _TOKENIZER_FILES:
        shutil.copy(fetched / name, directory / name)


if __name__ == "__main__":
    save(Path(sys.argv[1]), json.loads(sys.argv[2]))
