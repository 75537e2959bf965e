"""Adapters for tests: base descriptions, and PEFT directories of random weights, written without PEFT."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyhats.adapters.sites import EMBEDDING, HEAD, BaseDescription, Part, Site, WeightSource

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = ATTENTION + FEED_FORWARD
PREFIX = "base_model.model."


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
    is_tied: bool = True,
    weights: WeightSource | None = None,
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
    modules = {
        module_path(layer, name): (Part(Site(layer, name), range(d_out)),)
        for layer in range(num_layers)
        for name, (_, d_out) in linears.items()
    }
    tokens = range(vocab_size)
    modules |= {"model.embed_tokens": (Part(EMBEDDING, tokens),), "lm_head": (Part(HEAD, tokens),)}
    return BaseDescription(
        model_type="llama",
        names=frozenset(names),
        digest="sha256:" + "0" * 64,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        linears=linears,
        modules=modules,
        num_kv_heads=num_kv_heads,
        head_dim=head,
        is_tied=is_tied,
        weights=weights,
    )


@dataclass(frozen=True, slots=True)
class Target:
    """A module to adapt; fused ones count where any of their parts does."""

    module: str
    site_name: str
    d_in: int
    d_out: int


def targets(
    base: BaseDescription, sites: Collection[str], layers: Collection[int] | None = None
) -> list[Target]:
    """The modules that hold linears of these names, in these layers (None: all), ordered by site."""
    found = []
    for module, parts in sorted(base.modules.items(), key=lambda item: [part.site for part in item[1]]):
        names = [part.site.name for part in parts]
        if not set(names) & set(sites) or (layers is not None and parts[0].site.layer not in layers):
            continue
        d_out = sum(base.linears[name][1] for name in names)
        found.append(Target(module, names[0], base.linears[names[0]][0], d_out))
    return found


def target_names(base: BaseDescription, sites: Collection[str]) -> list[str]:
    """PEFT's ``target_modules`` for these linears."""
    return sorted({target.module.rpartition(".")[2] for target in targets(base, sites)})


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
    for target in targets(base, sites, layers):
        r = rank if isinstance(rank, int) else rank[target.site_name]
        a = torch.randn(r, target.d_in, generator=generator) * target.d_in**-0.5
        b = torch.randn(target.d_out, r, generator=generator) * scale
        tensors[f"{PREFIX}{target.module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}{target.module}.lora_B.weight"] = b.to(dtype)
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
        "target_modules": target_names(base, sites),
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


def make_dora(
    directory: Path,
    base: BaseDescription,
    *,
    rank: int = 4,
    sites: Collection[str] = ALL_LINEARS,
    layers: Collection[int] | None = None,
    seed: int = 0,
    scale: float = 0.1,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT DoRA directory; its magnitudes lie around 1. It is lowered with ``base.weights`` only."""
    tensors = lora_tensors(base, rank=rank, sites=sites, layers=layers, seed=seed, scale=scale)
    generator = torch.Generator().manual_seed(seed + 1)
    for target in targets(base, sites, layers):
        magnitude = 1 + 0.2 * torch.randn(target.d_out, generator=generator)
        tensors[f"{PREFIX}{target.module}.lora_magnitude_vector"] = magnitude
    config = lora_config(base, rank=rank, sites=sites, **({"use_dora": True} | config_overrides))
    return write_adapter(directory, config, tensors)


def make_adalora(
    directory: Path,
    base: BaseDescription,
    *,
    initial_rank: int = 6,
    kept: Mapping[str, int] = MappingProxyType({}),
    alpha: float = 16,
    sites: Collection[str] = ALL_LINEARS,
    layers: Collection[int] | None = None,
    seed: int = 0,
    scale: float = 0.3,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT AdaLoRA directory; ``kept`` says how many singular values a linear has left, by site name."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for target in targets(base, sites, layers):
        r = kept.get(target.site_name, initial_rank)
        name = f"{PREFIX}{target.module}"
        tensors[f"{name}.lora_A"] = torch.randn(r, target.d_in, generator=generator) * target.d_in**-0.5
        tensors[f"{name}.lora_B"] = torch.randn(target.d_out, r, generator=generator) * scale
        tensors[f"{name}.lora_E"] = torch.randn(r, 1, generator=generator)
        pattern[f"{target.module}.lora_E"] = [i < r for i in range(initial_rank)]
    config = {
        **_common_config(base, "ADALORA", sites),
        "init_r": initial_rank,
        "target_r": initial_rank,
        "lora_alpha": alpha,
        "total_step": 100,
        "rank_pattern": pattern if kept else None,
    }
    return write_adapter(directory, config | config_overrides, tensors)


def make_vera(
    directory: Path,
    base: BaseDescription,
    *,
    rank: int = 16,
    sites: Collection[str] = ALL_LINEARS,
    layers: Collection[int] | None = None,
    seed: int = 0,
    scale: float = 0.5,
    save_projection: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT VeRA directory; ``scale`` is the size of both vectors."""
    generator = torch.Generator().manual_seed(seed)
    adapted = targets(base, sites, layers)
    tensors: dict[str, Tensor] = {}
    for target in adapted:
        name = f"{PREFIX}{target.module}"
        tensors[f"{name}.vera_lambda_b"] = torch.randn(target.d_out, generator=generator) * scale
        tensors[f"{name}.vera_lambda_d"] = torch.randn(rank, generator=generator) * scale
    if save_projection:
        d_in, d_out = max(target.d_in for target in adapted), max(target.d_out for target in adapted)
        tensors["base_model.vera_A"] = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        tensors["base_model.vera_B"] = torch.randn(d_out, rank, generator=generator) * rank**-0.5
    config = {
        **_common_config(base, "VERA", sites),
        "r": rank,
        "projection_prng_key": seed,
        "save_projection": save_projection,
    }
    return write_adapter(directory, config | config_overrides, tensors)


def make_ia3(
    directory: Path,
    base: BaseDescription,
    *,
    sites: Collection[str] = ("k_proj", "v_proj", "down_proj"),
    feed_forward: Collection[str] = ("down_proj",),
    layers: Collection[int] | None = None,
    seed: int = 0,
    scale: float = 0.3,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT IA3 directory; factors lie around 1, on the inputs of ``feed_forward`` and on other outputs."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for target in targets(base, sites, layers):
        shape = (1, target.d_in) if target.site_name in feed_forward else (target.d_out, 1)
        tensors[f"{PREFIX}{target.module}.ia3_l"] = 1 + scale * torch.randn(shape, generator=generator)
    config = {
        **_common_config(base, "IA3", sites),
        "feedforward_modules": target_names(base, set(feed_forward) & set(sites)),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    return write_adapter(directory, config | config_overrides, tensors)


def make_token_rows(
    directory: Path,
    base: BaseDescription,
    ids: Sequence[int],
    *,
    rank: int = 4,
    sites: Collection[str] = ("q_proj",),
    seed: int = 0,
    scale: float = 0.5,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT LoRA directory that trains the embedding rows of ``ids`` too (on a tied base, the head's)."""
    rows = torch.randn(len(ids), base.hidden_size, generator=torch.Generator().manual_seed(seed)) * scale
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = lora_tensors(base, rank=rank, sites=sites, seed=seed) | {name: rows}
    config = lora_config(
        base, rank=rank, sites=sites, **({"trainable_token_indices": list(ids)} | config_overrides)
    )
    return write_adapter(directory, config, tensors)


def make_trainable_tokens(
    directory: Path,
    base: BaseDescription,
    *,
    ids: Sequence[int] = (3, 5, 8),
    seed: int = 0,
    scale: float = 0.5,
    **config_overrides: Any,
) -> Path:
    """Write a PEFT TRAINABLE_TOKENS directory: embedding rows of ``ids``, on a tied base the head's too."""
    rows = torch.randn(len(ids), base.hidden_size, generator=torch.Generator().manual_seed(seed)) * scale
    paths = ("model.embed_tokens", "lm_head") if base.is_tied else ("model.embed_tokens",)
    tensors = {f"{PREFIX}{path}.trainable_tokens_delta": rows.clone() for path in paths}
    config = {
        **_common_config(base, "TRAINABLE_TOKENS", ()),
        "target_modules": "model.embed_tokens",
        "token_indices": list(ids),
    }
    del config["modules_to_save"]
    return write_adapter(directory, config | config_overrides, tensors)


def _common_config(base: BaseDescription, peft_type: str, sites: Collection[str]) -> dict[str, Any]:
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": min(base.names, default=""),
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": target_names(base, sites),
    }


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a PEFT directory of any config and tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(dict(tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
