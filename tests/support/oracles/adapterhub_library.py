"""A program for an environment that has AdapterHub's library: adapters of random weights, and the values with them.

``python adapterhub_library.py CHECKPOINT OUT`` reads texts, lists of token ids, from ``OUT/texts.json``. It writes what
``save_adapter`` saves of each adapter to ``OUT/NAME``, and the last layer's hidden values of each text, read back into
another model, to ``OUT/NAME.npz``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

import adapters
from adapters import (
    AutoAdapterModel,
    CompacterConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
)

SMALL = {"reduction_factor": 4}
GATED = {**SMALL, "use_gating": True}
PREFIX = {"prefix_length": 5, "bottleneck_size": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuningConfig(prompt_length=5),
    "prompt-after-bos": lambda: PromptTuningConfig(prompt_length=5, combine="prefix_after_bos"),
    "compacter": lambda: CompacterConfig(phm_dim=2, **SMALL),
    "gated-double": lambda: DoubleSeqBnConfig(**GATED),
    "gated-parallel": lambda: ParBnConfig(**GATED),
    "gated-norms": lambda: SeqBnConfig(ln_before=True, ln_after=True, residual_before_ln=False, **GATED),
    "gated-lora": lambda: LoRAConfig(
        r=4,
        alpha=12,
        use_gating=True,
        attn_matrices=["q", "k", "v"],
        intermediate_lora=True,
        output_lora=True,
    ),
    "gated-ia3": lambda: IA3Config(use_gating=True, alpha=3),
    "gated-prefix": lambda: PrefixTuningConfig(use_gating=True, **PREFIX),
    "gated-prefix-flat": lambda: PrefixTuningConfig(
        use_gating=True, shared_gating=False, flat=True, **PREFIX
    ),
    "mam": lambda: MAMConfig(PrefixTuningConfig(**PREFIX), ParBnConfig(**SMALL)),
    "unipelt": lambda: UniPELTConfig(
        PrefixTuningConfig(**PREFIX), SeqBnConfig(**SMALL), LoRAConfig(r=4, alpha=2)
    ),
    "union": lambda: ConfigUnion(
        PromptTuningConfig(prompt_length=5), SeqBnInvConfig(**GATED), LoReftConfig(r=2)
    ),
    "loreft": lambda: LoReftConfig(r=2, suffix_positions=2),
    "loreft-tied": lambda: LoReftConfig(
        r=2, prefix_positions=2, suffix_positions=3, tied_weights=True, layers=[0]
    ),
    "noreft": lambda: NoReftConfig(r=3, suffix_positions=1),
    "direft": lambda: DiReftConfig(r=3, suffix_positions=1, non_linearity="relu"),
    "invertible": lambda: DoubleSeqBnInvConfig(**SMALL),
}


def load(checkpoint: Path, name: str) -> Any:
    """The base; every other adapter is saved from a model with heads, whose names have a prefix."""
    # The library's DistilBERT takes prompts under this attention only.
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    attention = "sdpa" if model_type == "distilbert" else "eager"
    kind = AutoAdapterModel if name == "compacter" or sorted(CONFIGS).index(name) % 2 else AutoModel
    model = kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=attention)
    if kind is AutoModel:
        adapters.init(model)
    return model.eval()


@torch.no_grad()
def randomize(model: Any, tag: str, seed: int) -> None:
    """Weights that change the values clearly; orthogonal projections stay that."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{tag}." not in f".{key}.":
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if "parametrizations" in key:
            values.diagonal().copy_(parameter.diagonal().sign())
            values.diagonal()[0] = -1
        else:
            is_factor = ("norm_" in key and key.endswith("weight")) or ("ia3" in tag and "lora_B" in key)
            values = values * 0.3 + float(is_factor)
        parameter.copy_(values)


def save(model: Any, target: Path, tag: str) -> bool:
    """As safetensors where the library can; returns whether it could."""
    try:
        model.save_adapter(str(target), tag, use_safetensors=True, with_head=False)
    except RuntimeError:  # tensors that it holds under several names
        shutil.rmtree(target)
        model.save_adapter(str(target), tag, with_head=False)
        return False
    return True


@torch.no_grad()
def values_of(model: Any, texts: list[list[int]]) -> dict[str, Any]:
    """Text → [T, D]."""
    outputs = (model.base_model(input_ids=torch.tensor([ids])) for ids in texts)
    return {str(index): output.last_hidden_state[0].numpy() for index, output in enumerate(outputs)}


def main() -> None:
    """Write every adapter and its values."""
    checkpoint, out = (Path(argument).resolve() for argument in sys.argv[1:3])
    texts = json.loads((out / "texts.json").read_text())
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model, tag = load(checkpoint, name), name.replace("-", "_")
        model.add_adapter(tag, config=config())
        randomize(model, tag, seed)
        is_safe = save(model, out / name, tag)
        if name == "direft":
            # Loaded again it would be NoReFT, since what distinguishes them is not saved.
            model.set_active_adapters(tag)
        else:
            model = load(checkpoint, name)
            model.load_adapter(str(out / name), use_safetensors=is_safe, set_active=True)
        np.savez(out / f"{name}.npz", **values_of(model, texts))


if __name__ == "__main__":
    main()
