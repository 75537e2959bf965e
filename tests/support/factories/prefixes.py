"""Adapters of virtual tokens for tests: PEFT directories of random numbers, written without PEFT, and their bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.formats.peft.format import recognise
from manyhats.adapters.formats.recognition import recorded_base
from manyhats.adapters.sites import BaseDescription
from support.factories.adapters import make_base, write_adapter

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model(family: str = "llama", *, seed: int = 0, **config: Any) -> Any:
    """A random float32 transformers model of two layers, the one that ``tiny_base`` describes by default."""
    transformers: Any = import_module("transformers")
    fields: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **_SHAPE,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **fields), dtype=torch.float32
        )
    model.train(False)
    return model


def tiny_base(
    model_type: str = "llama",
    *,
    num_layers: int = 2,
    hidden_size: int = 32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    embedding_scale: float = 1.0,
    **fields: Any,
) -> BaseDescription:
    """Describe a small base, its heads included; other arguments are those of ``adapters.make_base``."""
    base = make_base(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **fields,
    )
    return replace(
        base,
        model_type=model_type,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // num_heads,
        embedding_scale=embedding_scale,
    )


def prefix_tensors(
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A random KV prefix, [P, 2 · L · Hkv · K] of standard deviation ``scale``."""
    width = 2 * base.num_layers * base.num_kv_heads * base.head_dim
    return {"prompt_embeddings": _random((num_virtual_tokens, width), seed, scale).to(dtype)}


def prefix_config(base: BaseDescription, *, num_virtual_tokens: int = 4, **overrides: Any) -> dict[str, Any]:
    """A PEFT config for ``prefix_tensors``; ``overrides`` replace or add fields."""
    heads = {
        "token_dim": base.num_kv_heads * base.head_dim,
        "num_attention_heads": base.num_kv_heads,
        "encoder_hidden_size": base.num_kv_heads * base.head_dim,
        "prefix_projection": False,
        "init_weights": None,
    }
    return _prompt_config(base, "PREFIX_TUNING", num_virtual_tokens) | heads | overrides


def make_prefix(
    directory: Path,
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write a prefix tuning directory; the same arguments give the same bytes."""
    tensors = prefix_tensors(base, num_virtual_tokens=num_virtual_tokens, seed=seed, scale=scale, dtype=dtype)
    config = prefix_config(base, num_virtual_tokens=num_virtual_tokens, **config_overrides)
    return write_adapter(directory, config, tensors)


def prompt_tensors(
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random embeddings, [P, D] of standard deviation ``scale``."""
    shape = (num_virtual_tokens, base.hidden_size)
    return {"prompt_embeddings": _random(shape, seed, scale).to(dtype)}


def prompt_config(base: BaseDescription, *, num_virtual_tokens: int = 4, **overrides: Any) -> dict[str, Any]:
    """A PEFT config of prompt tuning for ``prompt_tensors``; ``overrides`` replace or add fields."""
    fields = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    return _prompt_config(base, "PROMPT_TUNING", num_virtual_tokens) | fields | overrides


def p_tuning_config(
    base: BaseDescription, *, num_virtual_tokens: int = 4, **overrides: Any
) -> dict[str, Any]:
    """A PEFT config of P-tuning for ``prompt_tensors``; ``overrides`` replace or add fields."""
    fields = {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": 16,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
    return _prompt_config(base, "P_TUNING", num_virtual_tokens) | fields | overrides


def make_prompt(
    directory: Path,
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write a prompt tuning directory; the same arguments give the same bytes."""
    tensors = prompt_tensors(base, num_virtual_tokens=num_virtual_tokens, seed=seed, scale=scale, dtype=dtype)
    config = prompt_config(base, num_virtual_tokens=num_virtual_tokens, **config_overrides)
    return write_adapter(directory, config, tensors)


def make_p_tuning(
    directory: Path,
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write a P-tuning directory; the same arguments give the same bytes."""
    tensors = prompt_tensors(base, num_virtual_tokens=num_virtual_tokens, seed=seed, scale=scale, dtype=dtype)
    config = p_tuning_config(base, num_virtual_tokens=num_virtual_tokens, **config_overrides)
    return write_adapter(directory, config, tensors)


def multitask_tensors(
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    num_tasks: int = 1,
    num_ranks: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A random shared prompt [P, D], and columns [T, P, R] and rows [T, R, D] of each task."""
    columns = _random((num_tasks, num_virtual_tokens, num_ranks), seed + 1, 1.0)
    rows = _random((num_tasks, num_ranks, base.hidden_size), seed + 2, 1.0)
    shared = _random((num_virtual_tokens, base.hidden_size), seed, 0.3)
    return {
        "prompt_embeddings": shared.to(dtype),
        "prefix_task_cols": columns.to(dtype),
        "prefix_task_rows": rows.to(dtype),
    }


def multitask_config(
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    num_tasks: int = 1,
    num_ranks: int = 1,
    **overrides: Any,
) -> dict[str, Any]:
    """A PEFT config for ``multitask_tensors``; ``overrides`` replace or add fields."""
    fields = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "num_tasks": num_tasks,
        "num_ranks": num_ranks,
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    }
    return prompt_config(base, num_virtual_tokens=num_virtual_tokens) | fields | overrides


def make_multitask_prompt(
    directory: Path,
    base: BaseDescription,
    *,
    num_virtual_tokens: int = 4,
    num_tasks: int = 1,
    num_ranks: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write a multitask prompt tuning directory; ``prompt_task_id`` says which task it is, if it has several."""
    sizes = {"num_virtual_tokens": num_virtual_tokens, "num_tasks": num_tasks, "num_ranks": num_ranks}
    tensors = multitask_tensors(base, **sizes, seed=seed, dtype=dtype)
    return write_adapter(directory, multitask_config(base, **sizes, **config_overrides), tensors)


def artifact_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterArtifact:
    """An artifact in memory, as the reader would make it."""
    return AdapterArtifact(
        digest="sha256:" + "1" * 64,
        method=recognise(config),
        config=config,
        tensors=tensors,
        base_model=recorded_base(config),
        size_bytes=1,
        num_parameters=1,
    )


def _prompt_config(base: BaseDescription, peft_type: str, num_virtual_tokens: int) -> dict[str, Any]:
    """The fields that PEFT writes for every method of virtual tokens."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": min(base.names, default=""),
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": 4,
        "num_layers": base.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": num_virtual_tokens,
        "peft_type": peft_type,
        "peft_version": "0.21.2",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": base.hidden_size,
    }


def _random(shape: Sequence[int], seed: int, scale: float) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
