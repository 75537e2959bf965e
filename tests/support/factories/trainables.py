"""Adapters in training on tiny bases, beside the same bases as transformers' models, for PEFT and the oracle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from manyhats.engine.checkpoints.loader import LoadedModel, Quantization, load_model
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.trainer.methods.adapter import TrainableAdapter
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from support.factories.tiny_models import make_checkpoint
from support.oracles.primitives import linears_of

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PEFT_CASES: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4, alpha=8),
    "rslora with patterns": LoraSettings(
        rank=4,
        alpha=6,
        use_rslora=True,
        target_modules=("o_proj", "down_proj"),
        rank_pattern={r"layers\.[1-9]\.mlp\..*": 2, "down_proj": 5},
        alpha_pattern={"o_proj": 2.5},
    ),
    "lora on the head": LoraSettings(rank=3, alpha=5, target_modules=("o_proj", "lm_head")),
    "dora": LoraSettings(rank=3, alpha=4, use_dora=True, target_modules=ALL_LINEARS),
    "ia3": Ia3Settings(output_modules=("o_proj",), input_modules=("down_proj",)),
    "ia3 of outputs": Ia3Settings(output_modules=("o_proj", "down_proj"), input_modules=()),
    "prefix": PrefixSettings(num_virtual_tokens=5, projection_size=0),
    "projected prefix": PrefixSettings(num_virtual_tokens=5, projection_size=7),
    "prompt": PromptSettings(num_virtual_tokens=4),
    "p-tuning": PTuningSettings(num_virtual_tokens=4, encoder_size=6),
}
"""One of each method that PEFT has, for bases of separate and of fused linears alike."""

BOTTLENECK_CASES: dict[str, AdapterSettings] = {
    "seq": BottleneckSettings(variant="seq", reduction_factor=16),
    "double_seq": BottleneckSettings(variant="double_seq", reduction_factor=8, non_linearity="swish"),
    "parallel": BottleneckSettings(variant="parallel", reduction_factor=5, non_linearity="gelu"),
    "scaled": BottleneckSettings(variant="seq", reduction_factor=64, scaling=0.5),
}

ALL_CASES = PEFT_CASES | BOTTLENECK_CASES


@dataclass(frozen=True, slots=True, eq=False)
class TinyBase:
    """A base as the trainer has it, and as transformers has it: dense, with the same values."""

    model: LoadedModel
    dense: Any


@cache
def tiny_base(family: str = "llama", quantization: Quantization = "none", *, tie: bool = False) -> TinyBase:
    """A random base: two layers, hidden size 64, 4 heads of 16, 2 of keys and values, 320 tokens."""
    transformers: Any = import_module("transformers")
    with tempfile.TemporaryDirectory() as name:
        directory = make_checkpoint(Path(name) / "tiny", family, tie=tie)
        model = load_model(
            str(directory), quantization=quantization, dtype=torch.float32, home=Path(name) / "home"
        )
        dense = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dense.train(False)
    dense.set_attn_implementation("eager")
    _copy_dequantized(model, dense)
    return TinyBase(model, dense)


def _copy_dequantized(model: LoadedModel, dense: Any) -> None:
    for index, layer in enumerate(dense.model.layers):
        own = model.weights.blocks[index].linears
        for _, module, parts in linears_of(layer):
            weights = [own[name].matrix for name, _ in parts]
            rows = [each.dequantize() if isinstance(each, Nf4Weight) else each for each in weights]
            module.weight.data.copy_(torch.cat(rows))


@torch.no_grad()
def move(adapter: TrainableAdapter, *, size: float = 0.2, seed: int = 7) -> None:
    """Move every parameter by random numbers of a size, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters.values():
        parameter += torch.randn(parameter.shape, generator=generator) * size


def save(adapter: TrainableAdapter, directory: Path, save_dtype: str = "float32") -> Path:
    """Write the artifact's files."""
    return write_files(adapter.files(save_dtype), directory)


def write_files(files: Mapping[str, bytes], directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory
