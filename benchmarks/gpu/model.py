"""A Llama of random NF4 weights, made on the device, and adapters for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.scale import Shape
from manyhats.adapters.primitives import Delta, LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.model.families.reading import read_family
from manyhats.engine.model.layout import Family
from manyhats.engine.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4_CODE, Nf4Weight
from manyhats.engine.model.weights import BlockWeights, Linear, NormWeight, Weights

_CODE_STD = 0.57
"""Of NF4's codes, drawn evenly."""


@dataclass(frozen=True, slots=True, eq=False)
class RandomModel:
    """A model in memory; ``config`` is that of its files."""

    config: dict[str, Any]
    family: Family
    weights: Weights

    @property
    def architecture(self) -> Architecture:
        """What it computes."""
        return self.family.architecture

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step must read: linears and head."""
        matrices = [linear.matrix for linear in (*self.weights.linears(), self.weights.head)]
        return sum(m.num_bytes if isinstance(m, Nf4Weight) else m.nbytes for m in matrices)

    def kv_bytes(self, rows: int, context: int) -> int:
        """Bytes of keys and values that so many rows behind so many positions read."""
        return rows * context * self.architecture.kv_bytes_per_token("bfloat16")


def make_model(shape: Shape, device: torch.device, seed: int = 0) -> RandomModel:
    """A random model of a shape."""
    generator = torch.Generator(device).manual_seed(seed)
    config = config_of(shape)
    family = read_family(config)
    architecture = family.architecture

    def dense(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        return values * float(size[1] ** -0.5)

    def norm(size: int) -> NormWeight:
        return NormWeight(torch.ones(size, device=device))

    blocks = tuple(
        BlockWeights(
            {each.name: Linear(random_nf4(each.d_out, each.d_in, generator)) for each in block.linears()},
            {each.name: norm(block.hidden_size) for each in block.norms()},
        )
        for block in architecture.blocks
    )
    vocab_size, hidden_size = architecture.vocab_size, architecture.hidden_size
    outer = {"lm_head": Linear(dense(vocab_size, hidden_size))}
    return RandomModel(
        config, family, Weights(dense(vocab_size, hidden_size), blocks, norm(hidden_size), outer)
    )


def config_of(shape: Shape) -> dict[str, Any]:
    """The model's ``config.json``."""
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }


def random_nf4(rows: int, columns: int, generator: torch.Generator, *, is_nested: bool = True) -> Nf4Weight:
    """A matrix of random codes, whose products with values of size 1 have size 1; on the generator's device."""
    device = generator.device
    num_blocks = rows * columns // BLOCK_SIZE
    num_groups = -(-num_blocks // NESTED_BLOCK_SIZE)
    mean = float(columns**-0.5 / _CODE_STD)

    def some_bytes(size: int) -> Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator, device=device)

    def spread(size: int) -> Tensor:
        return (torch.rand(size, generator=generator, device=device) + 1) * (0.5 * mean)

    return Nf4Weight(
        packed=some_bytes(rows * columns // 2),
        absmax=some_bytes(num_blocks) if is_nested else spread(num_blocks),
        nested_absmax=spread(num_groups) * 0.3 if is_nested else torch.empty(0, device=device),
        offset=float(torch.tensor(mean)) if is_nested else 0.0,
        code=torch.tensor(NF4_CODE, device=device),
        nested_code=torch.linspace(-1, 1, 256 if is_nested else 0, device=device),
        shape=(rows, columns),
    )


def random_lora(architecture: Architecture, rank: int, name: str) -> LoweredAdapter:
    """A LoRA on all linears of all layers, in host memory."""
    generator = torch.Generator().manual_seed(rank)

    def dense(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

    deltas: list[Delta] = [
        LowRank(
            Site(layer, linear.name),
            dense(rank, linear.d_in, linear.d_in**-0.5),
            dense(linear.d_out, rank, 0.02),
            1.0,
        )
        for layer, block in enumerate(architecture.blocks)
        for linear in block.linears()
    ]
    return LoweredAdapter(name, tuple(deltas))


def adapter_bytes(architecture: Architecture, rank: int) -> int:
    """Bytes of a LoRA on all linears, in bfloat16."""
    linears = (linear for block in architecture.blocks for linear in block.linears())
    return sum(2 * rank * (linear.d_in + linear.d_out) for linear in linears)
