"""Adapters for tests: base descriptions, and PEFT directories of random weights, written without PEFT."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyhats.adapters.sites import BaseDescription, Site

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = ATTENTION + FEED_FORWARD


def module_path(layer: int, name: str) -> str:
    """The Hugging Face module path of a linear of the Llama family."""
    block = "self_attn" if name in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{name}"


def make_base(
    *,
    num_layers: int = 2,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = 64,
    names: Collection[str] = ("test/tiny",),
) -> BaseDescription:
    """Describe a small Llama; the same arguments as ``LlamaConfig`` describe that model."""
    head = head_dim or hidden_size // num_heads
    q, kv = num_heads * head, num_kv_heads * head
    linears = {
        "q_proj": (hidden_size, q),
        "k_proj": (hidden_size, kv),
        "v_proj": (hidden_size, kv),
        "o_proj": (q, hidden_size),
        "gate_proj": (hidden_size, intermediate_size),
        "up_proj": (hidden_size, intermediate_size),
        "down_proj": (intermediate_size, hidden_size),
    }
    modules = {module_path(layer, name): Site(layer, name) for layer in range(num_layers) for name in linears}
    return BaseDescription(
        model_type="llama",
        names=frozenset(names),
        digest="sha256:" + "0" * 64,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        linears=linears,
        modules=modules,
    )


def lora_tensors(
    base: BaseDescription,
    *,
    rank: int | Mapping[str, int] = 8,
    sites: Collection[str] = ALL_LINEARS,
    layers: Collection[int] | None = None,
    seed: int = 0,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random LoRA matrices by PEFT's tensor names; the arguments are those of ``make_lora``."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module, site in sorted(base.modules.items(), key=lambda item: item[1]):
        if site.name not in sites or (layers is not None and site.layer not in layers):
            continue
        d_in, d_out = base.linears[site.name]
        r = rank if isinstance(rank, int) else rank[site.name]
        a = torch.randn(r, d_in, generator=generator) * d_in**-0.5
        b = torch.randn(d_out, r, generator=generator) * scale
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype)
    return tensors


def lora_config(
    base: BaseDescription,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float = 16,
    sites: Collection[str] = ALL_LINEARS,
    **overrides: Any,
) -> dict[str, Any]:
    """A PEFT config for ``lora_tensors`` of the same arguments; ``overrides`` replace or add fields."""
    ranks = {} if isinstance(rank, int) else {name: r for name, r in rank.items() if name in sites}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": min(base.names, default=""),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank if isinstance(rank, int) else next(iter(ranks.values())),
        "rank_pattern": ranks,
        "alpha_pattern": {},
        "target_modules": sorted(sites),
        "use_dora": False,
        "use_rslora": False,
    }
    return config | overrides


def make_lora(
    directory: Path,
    base: BaseDescription,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float = 16,
    sites: Collection[str] = ALL_LINEARS,
    layers: Collection[int] | None = None,
    seed: int = 0,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT LoRA directory of random weights.

    Args:
        directory: made if it is missing.
        base: the model it fits; its first name is recorded.
        rank: of every linear, or by site name.
        alpha: of every linear.
        sites: names of the linears it acts on.
        layers: the layers it acts on; None for all.
        seed: the same arguments and seed give the same bytes.
        scale: standard deviation of B (A's is 1 / √d_in); the delta of a unit input grows with it.
        dtype: that the tensors are stored in.
        config_overrides: fields of ``adapter_config.json``, such as ``use_rslora=True``.

    Returns:
        ``directory``.
    """
    tensors = lora_tensors(base, rank=rank, sites=sites, layers=layers, seed=seed, scale=scale, dtype=dtype)
    config = lora_config(base, rank=rank, alpha=alpha, sites=sites, **config_overrides)
    return write_adapter(directory, config, tensors)


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a PEFT directory of any config and tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(dict(tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
