"""A directory for each method of each format, for any base of the Llama family that has a head of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapterhub import make_adapterhub
from support.factories.adapters import (
    PREFIX,
    lora_config,
    lora_tensors,
    make_adalora,
    make_dora,
    make_ia3,
    make_lora,
    make_token_rows,
    make_trainable_tokens,
    make_vera,
    write_adapter,
)
from support.factories.prefixes import make_multitask_prompt, make_p_tuning, make_prefix, make_prompt


@dataclass(frozen=True, slots=True)
class Sizes:
    """What differs from one set of adapters to another.

    Attributes:
        rank: of the low-rank methods; some take one more or less.
        num_virtual_tokens: P of the others; some take more.
        seed: of all weights.
    """

    rank: int = 4
    num_virtual_tokens: int = 7
    seed: int = 0


Make = Callable[[Path, BaseDescription, Sizes], Path]


def _embedding_lora(directory: Path, base: BaseDescription, sizes: Sizes) -> Path:
    generator = torch.Generator().manual_seed(sizes.seed)
    tensors = lora_tensors(base, rank=sizes.rank, sites=["v_proj"], seed=sizes.seed)
    module = f"{PREFIX}model.embed_tokens."
    tensors[f"{module}lora_embedding_A"] = torch.randn(sizes.rank, base.vocab_size, generator=generator)
    tensors[f"{module}lora_embedding_B"] = (
        torch.randn(base.hidden_size, sizes.rank, generator=generator) * 0.2
    )
    config = lora_config(base, rank=sizes.rank, target_modules=["embed_tokens", "v_proj"])
    return write_adapter(directory, config, tensors)


def _saved_head(directory: Path, base: BaseDescription, sizes: Sizes) -> Path:
    generator = torch.Generator().manual_seed(sizes.seed)
    tensors = lora_tensors(base, rank=sizes.rank, sites=["q_proj"], seed=sizes.seed)
    shape = (base.vocab_size, base.hidden_size)
    tensors[f"{PREFIX}lm_head.weight"] = torch.randn(shape, generator=generator) * base.hidden_size**-0.5
    config = lora_config(base, rank=sizes.rank, sites=["q_proj"], modules_to_save=["lm_head"])
    return write_adapter(directory, config, tensors)


def _adapterhub(preset: str, scale: float) -> Make:
    def make(directory: Path, base: BaseDescription, sizes: Sizes) -> Path:
        fields: dict[str, Any] = (
            {"prefix_length": sizes.num_virtual_tokens} if preset.startswith("prefix") else {}
        )
        return make_adapterhub(directory, base, preset, seed=sizes.seed, scale=scale, **fields)

    return make


PLAIN: Mapping[str, tuple[AdapterMethod, Make]] = {
    "lora": (
        AdapterMethod.LORA,
        lambda path, base, s: make_lora(path, base, rank=s.rank, seed=s.seed),
    ),
    "rslora": (
        AdapterMethod.LORA,
        lambda path, base, s: make_lora(path, base, rank=2 * s.rank, seed=s.seed + 1, use_rslora=True),
    ),
    "embedding-lora": (AdapterMethod.LORA, _embedding_lora),
    "token-rows": (
        AdapterMethod.LORA,
        lambda path, base, s: make_token_rows(
            path, base, range(3, base.vocab_size, 5), rank=s.rank, seed=s.seed
        ),
    ),
    "saved-head": (AdapterMethod.LORA, _saved_head),
    "dora": (AdapterMethod.DORA, lambda path, base, s: make_dora(path, base, rank=s.rank, seed=s.seed)),
    "adalora": (
        AdapterMethod.ADALORA,
        lambda path, base, s: make_adalora(
            path, base, initial_rank=s.rank + 2, kept={"q_proj": s.rank, "down_proj": 1}, seed=s.seed
        ),
    ),
    "vera": (AdapterMethod.VERA, lambda path, base, s: make_vera(path, base, rank=4 * s.rank, seed=s.seed)),
    "ia3": (AdapterMethod.IA3, lambda path, base, s: make_ia3(path, base, seed=s.seed)),
    "seq-bn": (AdapterMethod.BOTTLENECK, _adapterhub("seq_bn", 0.3)),
    "double-seq-bn": (AdapterMethod.BOTTLENECK, _adapterhub("double_seq_bn", 0.3)),
    "par-bn": (AdapterMethod.BOTTLENECK, _adapterhub("par_bn", 0.3)),
    "adapterhub-lora": (AdapterMethod.LORA, _adapterhub("lora", 0.3)),
    "adapterhub-ia3": (AdapterMethod.IA3, _adapterhub("ia3", 0.5)),
    "adapterhub-prefix": (AdapterMethod.PREFIX_TUNING, _adapterhub("prefix", 1.0)),
    "adapterhub-prefix-flat": (AdapterMethod.PREFIX_TUNING, _adapterhub("prefix_flat", 1.0)),
    "union": (AdapterMethod.UNION, _adapterhub("mam", 0.3)),
    "prefix": (
        AdapterMethod.PREFIX_TUNING,
        lambda path, base, s: make_prefix(path, base, num_virtual_tokens=s.num_virtual_tokens, seed=s.seed),
    ),
    "prompt": (
        AdapterMethod.PROMPT_TUNING,
        lambda path, base, s: make_prompt(
            path, base, num_virtual_tokens=s.num_virtual_tokens + 1, seed=s.seed
        ),
    ),
    "p-tuning": (
        AdapterMethod.P_TUNING,
        lambda path, base, s: make_p_tuning(
            path, base, num_virtual_tokens=2 * s.num_virtual_tokens, seed=s.seed
        ),
    ),
    "multitask": (
        AdapterMethod.MULTITASK_PROMPT_TUNING,
        lambda path, base, s: make_multitask_prompt(
            path, base, num_virtual_tokens=s.num_virtual_tokens, num_ranks=2, seed=s.seed
        ),
    ),
    "trainable-tokens": (
        AdapterMethod.TRAINABLE_TOKENS,
        lambda path, base, s: make_trainable_tokens(
            path, base, ids=range(1, base.vocab_size, 3), seed=s.seed
        ),
    ),
}
"""Task → its method, and what writes its directory."""

COMPOSED: Mapping[str, Mapping[str, float]] = {
    "two-loras": {"lora": 0.7, "rslora": -0.4},
    "prompt-over-loras": {"lora": 1.0, "rslora": 0.5, "prompt": 1.0},
    "prefix-and-bottleneck": {"prefix": 1.0, "seq-bn": 1.0},
}
"""Task → the tasks whose artifacts are its parts, with their weights."""


def register_every_method(
    store: AdapterStore, directory: Path, base: BaseDescription, sizes: Sizes
) -> dict[str, AdapterRecord]:
    """Write a directory for each method, which the store may read, and register all tasks."""
    records = {}
    for task, (method, make) in PLAIN.items():
        records[task] = store.register(
            Registration(task, Uri(str(make(directory / task, base, sizes))))
        ).record
        assert records[task].method is method
    for task, parts in COMPOSED.items():
        sources = [Part(str(directory / part), weight) for part, weight in parts.items()]
        records[task] = store.register(Registration(task, Parts(sources))).record
        assert records[task].method is AdapterMethod.COMPOSED
    return records
