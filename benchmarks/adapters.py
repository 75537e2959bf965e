"""Adapters of random weights, as PEFT and AdapterHub save them: every system reads the same files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.workload import Adapter, Settings
from manyhats.adapters.formats.peft.tensors import find_target
from manyhats.adapters.sites import BaseDescription

_B_SCALE = 0.02
"""Of B's entries: a delta that counts, and does not drown the base."""
_REDUCTION_FACTOR = 16
"""D over the bottleneck's size; what AdapterHub's presets have."""


def make_adapters(
    root: Path, base: BaseDescription, adapters: Collection[Adapter], settings: Settings
) -> Mapping[Adapter, Path]:
    """Write a directory for each adapter, each with its own random weights in bfloat16."""
    makers = {"lora": _lora, "bottleneck": _bottleneck, "prefix": _prefix, "prompt": _prompt}
    paths = {}
    for adapter in sorted(adapters):
        generator = torch.Generator().manual_seed(adapter.index)
        config, tensors, file = makers[adapter.method](base, settings, generator)
        paths[adapter] = root / adapter.name
        paths[adapter].mkdir(parents=True)
        (paths[adapter] / "adapter_config.json").write_text(json.dumps(config))
        halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(halved, paths[adapter] / file, metadata={"format": "pt"})
    return paths


_Content = tuple[dict[str, Any], dict[str, Tensor], str]
"""Config, tensors, and the name of the tensors' file."""
_PEFT_FILE = "adapter_model.safetensors"


def _lora(base: BaseDescription, settings: Settings, generator: torch.Generator) -> _Content:
    """On all linears."""
    rank = settings.adapter_rank
    tensors = {}
    for module in base.modules:
        target = find_target(module, base)
        if target is None or target.is_head:
            continue
        d_in, d_out = target.d_in, target.d_out
        a = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        b = torch.randn(d_out, rank, generator=generator) * _B_SCALE
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config = {
        **_peft_config("LORA"),
        "bias": "none",
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(base.linears),
    }
    return config, tensors, _PEFT_FILE


def _bottleneck(base: BaseDescription, settings: Settings, generator: torch.Generator) -> _Content:
    """AdapterHub's sequential bottleneck, after the feed-forward of every layer."""
    hidden = base.hidden_size
    size = max(1, hidden // _REDUCTION_FACTOR)
    tensors = {}
    for layer in range(base.num_layers):
        prefix = f"model.layers.{layer}.output_adapters.adapters.bench."
        down = torch.randn(size, hidden, generator=generator) * hidden**-0.5
        up = torch.randn(hidden, size, generator=generator) * _B_SCALE
        tensors[f"{prefix}adapter_down.0.weight"] = down
        tensors[f"{prefix}adapter_down.0.bias"] = torch.zeros(size)
        tensors[f"{prefix}adapter_up.weight"] = up
        tensors[f"{prefix}adapter_up.bias"] = torch.zeros(hidden)
    config = {
        "config": {
            "non_linearity": "relu",
            "mh_adapter": False,
            "output_adapter": True,
            "original_ln_before": True,
            "reduction_factor": _REDUCTION_FACTOR,
        },
        "hidden_size": hidden,
        "model_type": base.model_type,
        "name": "bench",
    }
    return config, tensors, "adapter.safetensors"


def _prefix(base: BaseDescription, settings: Settings, generator: torch.Generator) -> _Content:
    width = 2 * base.num_layers * base.num_kv_heads * base.head_dim
    config = {
        **_virtual_config("PREFIX_TUNING", base, settings),
        "num_attention_heads": base.num_kv_heads,
        "prefix_projection": False,
        "token_dim": base.num_kv_heads * base.head_dim,
    }
    table = torch.randn(settings.virtual_tokens, width, generator=generator)
    return config, {"prompt_embeddings": table}, _PEFT_FILE


def _prompt(base: BaseDescription, settings: Settings, generator: torch.Generator) -> _Content:
    table = torch.randn(settings.virtual_tokens, base.hidden_size, generator=generator)
    config = {**_virtual_config("PROMPT_TUNING", base, settings), "token_dim": base.hidden_size}
    return config, {"prompt_embeddings": table * _B_SCALE}, _PEFT_FILE


def _virtual_config(peft_type: str, base: BaseDescription, settings: Settings) -> dict[str, Any]:
    return {
        **_peft_config(peft_type),
        "num_layers": base.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": settings.virtual_tokens,
    }


def _peft_config(peft_type: str) -> dict[str, Any]:
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "inference_mode": True,
    }
