"""Tiny random Hugging Face checkpoints with a working byte-level tokenizer, for parity and engine tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from manyhats.engine.model.families.fields import OWN_NAMES

TINY_VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LINEARS = {
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "gptj": ["q_proj", "v_proj", "fc_in", "fc_out"],
    "starcoder2": ["q_proj", "v_proj", "c_fc", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["k_proj", "v_proj", "o_proj"],
}
_RENAMED = ("intermediate_size",)
"""Fields whose other names transformers' config classes don't know themselves."""
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "and"),
    ("e", "r"),
)


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer: ids 0 to 2 are special, then the 256 bytes, then a few merges.

    Every byte is a token, so any text and any split of a character over tokens can be had.
    """
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in _MERGES)):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def save_tokenizer(directory: Path, tokenizer: Tokenizer | None = None, **config: Any) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; ``config`` adds to the latter."""
    (tokenizer or tiny_tokenizer()).save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[2],
        "unk_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


def make_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    tie: bool = False,
    hidden_size: int = 64,
    num_layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 128,
    vocab_size: int = TINY_VOCAB_SIZE,
    max_position_embeddings: int = 512,
    rope: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    **overrides: Any,
) -> Path:
    """Save a random model of a family, as transformers saves it, and a tokenizer for it.

    Args:
        directory: created if need be.
        family: its ``model_type``, such as ``llama``.
        seed: of the weights; the global generator is left alone.
        tie: whether the output head is the embedding.
        rope: ``rope_parameters``; None is the plain kind. Those of gemma3_text are for its full attention.
        sliding_window: of every layer (mistral, mixtral, phi3, qwen3_moe), of all but the first (qwen2 and 3), or of
            the layers that the family itself lets slide.
        overrides: other fields of the config, such as ``head_dim`` or ``attention_bias``.

    Returns:
        The directory.
    """
    transformers: Any = import_module("transformers")

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie,
        "rope_parameters": _rope_fields(
            family, dict(rope or {"rope_type": "default", "rope_theta": 10000.0})
        ),
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
        **_window_fields(family, sliding_window),
        **_family_fields(family, hidden_size // heads),
        **overrides,
    }
    fields = {_own_name(family, name): value for name, value in fields.items()}
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **fields), dtype=dtype
        )
    randomize(model, seed)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=EOS_TOKEN_ID, pad_token_id=EOS_TOKEN_ID
    )
    directory.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def linears_of(family: str) -> list[str]:
    """Names of some linears of a family, of attention and feed-forward; the last is behind the activation."""
    return list(_LINEARS.get(family, ("q_proj", "v_proj", "up_proj", "down_proj")))


def _own_name(family: str, name: str) -> str:
    """What a family's config calls a field."""
    names = {standard: own for own, standard in OWN_NAMES.get(family, {}).items()}
    return names.get(name, name) if name in _RENAMED else name


def _rope_fields(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    if family in ("gpt_neox", "phi"):
        return {"partial_rotary_factor": 0.5, **rope}
    if family != "gemma3_text":
        return rope
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}


def _window_fields(family: str, window: int | None) -> dict[str, Any]:
    if family in ("mistral", "mixtral", "phi3"):
        return {"sliding_window": window}
    if window is None:
        return {}
    if family in ("qwen2", "qwen3"):
        return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return {"use_sliding_window": True, "sliding_window": window}


def _family_fields(family: str, head_dim: int) -> dict[str, Any]:
    """Fields at which everything special about a family shows in a tiny model's logits."""
    gemma = {"head_dim": head_dim, "query_pre_attn_scalar": head_dim + 8}
    fields: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": head_dim},
        "gemma2": {**gemma, "attn_logit_softcapping": 2.5, "final_logit_softcapping": 4.0},
        "gemma3_text": {**gemma, "sliding_window_pattern": 2},
        "granite": {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.15,
            "logits_scaling": 1.7,
        },
        "smollm3": {"no_rope_layer_interval": 2},
        "gptj": {"rotary_dim": head_dim // 2},
        "gemma": {"head_dim": head_dim},
        "opt": {"word_embed_proj_dim": head_dim * 4},
        "falcon": {"num_kv_heads": 2},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {
            "head_dim": head_dim,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
        "cohere2": {"head_dim": head_dim, "layer_types": ["sliding_attention", "full_attention"]},
    }
    return fields.get(family, {})


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights of a size at which every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    norm_centre = 0.0 if "Gemma" in type(model).__name__ else 1.0
    norms = tuple(
        f"{name}.weight" for name, module in model.named_modules() if "Norm" in type(module).__name__
    )

    def random(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if name in norms:
            parameter.copy_(norm_centre + 0.2 * random(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.3 * random(parameter))
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            parameter.copy_(0.5 * random(parameter))
        else:
            parameter.copy_(1.5 * random(parameter) / parameter.shape[-1] ** 0.5)
