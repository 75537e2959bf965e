"""LoRA adapters of random weights, as PEFT saves them: every system reads the same files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from manyhats.adapters.sites import BaseDescription

_B_SCALE = 0.02
"""Of B's entries: a delta that counts, and does not drown the base."""


def make_adapters(root: Path, base: BaseDescription, *, count: int, rank: int) -> tuple[Path, ...]:
    """Write LoRA directories that act on all linears, each with its own random weights in bfloat16."""
    return tuple(_make_adapter(root / f"adapter{index}", base, rank, index) for index in range(count))


def _make_adapter(directory: Path, base: BaseDescription, rank: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, site in base.modules.items():
        if site.name not in base.linears:
            continue  # the embedding or the head
        d_in, d_out = base.linears[site.name]
        a = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        b = torch.randn(d_out, rank, generator=generator) * _B_SCALE
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(base.linears),
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
