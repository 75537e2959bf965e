"""PEFT as the oracle: tiny transformers models, adapters that PEFT saves of them, and PEFT's own logits."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from support.oracles.primitives import describe_model, logits_with

IDS = (3, 17, 42, 5, 63, 8)
"""A prompt of the tiny models' 64 tokens."""

PEFT_FAMILIES = ("llama", "mistral", "qwen2")
"""qwen2 has biases on q, k and v."""


def tiny_model(family: str = "llama", *, tie: bool = False) -> Any:
    """A random model: two layers, hidden size 32, 4 heads of 8, 2 of keys and values, 64 tokens."""
    transformers: Any = import_module("transformers")
    fields = {"head_dim": 8, "sliding_window": 512} if family in ("gemma2", "gemma3_text", "phi3") else {}
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
    model.train(False)
    model.set_attn_implementation("eager")
    return model


def make_peft(model: Any, config: Any, *, size: float = 0.2, seed: int = 1) -> Any:
    """A PEFT model around a copy of ``model``, each trainable parameter moved by random numbers of a size."""
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        peft = import_module("peft").get_peft_model(copy.deepcopy(model), config)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * size
    peft.train(False)
    return peft


def save_peft(peft: Any, directory: Path, **arguments: Any) -> Path:
    """Save as PEFT does."""
    with _quiet():
        peft.save_pretrained(str(directory), **arguments)
    return directory


@torch.no_grad()
def peft_logits(model: Any, directory: Path, ids: tuple[int, ...] = IDS) -> Tensor:
    """[T, V] of what PEFT makes of a directory, loaded around a copy of ``model``."""
    with _quiet():
        peft = import_module("peft").PeftModel.from_pretrained(copy.deepcopy(model), str(directory))
        peft.train(False)
        logits: Tensor = peft(input_ids=torch.tensor([ids])).logits[0]
    return logits


@torch.no_grad()
def base_logits(model: Any, ids: tuple[int, ...] = IDS) -> Tensor:
    """[T, V] of the model alone."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def read(directory: Path, base: BaseDescription, limits: AdapterLimits | None = None) -> AdapterArtifact:
    """Read a directory as registration does."""
    with open_source(str(directory), [directory]) as source:
        return read_adapter(source, base, limits or AdapterLimits()).artifact


def read_lowered(directory: Path, base: BaseDescription) -> LoweredAdapter:
    """Read and lower a directory as registration does."""
    return lower(read(directory, base), base)


def check_against_peft(model: Any, directory: Path, *, tolerance: float = 1e-4) -> LoweredAdapter:
    """Compare the lowered adapter's logits with PEFT's; both must move them clearly."""
    lowered = read_lowered(directory, describe_model(model))
    expected = peft_logits(model, directory)
    assert (expected - base_logits(model)).abs().max() > 1e-2
    torch.testing.assert_close(logits_with(model, lowered, IDS), expected, atol=tolerance, rtol=tolerance)
    return lowered


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of much that these tests want."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
