"""Models and adapters that outputs are recorded of: random, by seed, written by the factories of the tests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from manyhats.adapters.sites import BaseDescription, Part, Site
from support.factories.adapterhub import make_adapterhub
from support.factories.adapters import (
    PREFIX,
    lora_config,
    lora_tensors,
    make_base,
    make_dora,
    make_ia3,
    make_lora,
    write_adapter,
)
from support.factories.every_method import COMPOSED, PLAIN, Sizes
from support.factories.prefixes import make_prefix, make_prompt
from support.factories.tiny_models import CHAT_TEMPLATE, make_checkpoint

DEFAULT_MODEL = "smollm2-135m-instruct"
TINY_NAME = "test/tiny"
_WINDOW = {"sliding_window": 20}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": _WINDOW,
    "qwen3": _WINDOW,
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "phi3": {**_WINDOW, "hidden_size": 256},
    "granite": {},
    "olmo2": {},
    "smollm3": {**_WINDOW, "num_layers": 3},
}
"""Family → what its tiny model has that others have not.

Windows are shorter than the prompts; phi3's fused linears are wide enough to be cut in NF4.
"""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is served, and the tasks on it.

    Attributes:
        model: as ``--model`` has it.
        vocab_size: of ids that prompts may have.
        long: tokens of a prompt that takes several steps.
        tasks: task → directory under ``adapters``.
        composed: task → directory and weight of each part.
    """

    name: str
    model: str
    vocab_size: int
    long: int
    tasks: Mapping[str, str]
    composed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def ids(self, count: int, seed: int = 0) -> list[int]:
        """A random prompt without special tokens."""
        return random.Random(seed).choices(range(3, self.vocab_size), k=count)

    def every_fifth(self) -> Subject:
        """The same model with fewer tasks."""
        return replace(self, tasks=dict(list(self.tasks.items())[::5]), composed={})


def make_subjects(root: Path) -> Iterator[Subject]:
    """Write all models and adapters under ``root``."""
    for family, shape in FAMILIES.items():
        make_checkpoint(root / "models" / family, family, **shape)
        base = _describe(family, shape)
        directory = root / "adapters" / family
        if family == "llama":
            yield replace(_tiny(family, _every_method(directory, base)), composed=_composed())
        else:
            yield _tiny(family, _some_methods(directory, base))
    base = make_base(
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        vocab_size=49152,
        names=("HuggingFaceTB/SmolLM2-135M-Instruct",),
    )
    tasks = _some_methods(root / "adapters" / DEFAULT_MODEL, base)
    make_adapterhub(root / "adapters" / DEFAULT_MODEL / "double-seq-bn", base, "double_seq_bn", scale=0.02)
    yield Subject(
        name=DEFAULT_MODEL,
        model=DEFAULT_MODEL,
        vocab_size=base.vocab_size,
        long=300,
        tasks={**tasks, "double-seq-bn": f"{DEFAULT_MODEL}/double-seq-bn"},
    )


def _tiny(family: str, tasks: Mapping[str, str]) -> Subject:
    return Subject(name=family, model=f"models/{family}", vocab_size=320, long=300, tasks=tasks)


def _describe(family: str, shape: Mapping[str, Any]) -> BaseDescription:
    """A tiny model as the factories of adapters want it described."""
    base = make_base(
        num_layers=shape.get("num_layers", 2),
        hidden_size=shape.get("hidden_size", 64),
        intermediate_size=128,
        vocab_size=320,
        names=(TINY_NAME,),
        is_tied=False,
    )
    if family != "phi3":
        return replace(base, model_type=family)
    fused = {}
    for layer in range(base.num_layers):
        path = f"model.layers.{layer}"
        fused[f"{path}.self_attn.qkv_proj"] = _joined(base, layer, ("q_proj", "k_proj", "v_proj"))
        fused[f"{path}.mlp.gate_up_proj"] = _joined(base, layer, ("gate_proj", "up_proj"))
    inside = {part.site for parts in fused.values() for part in parts}
    modules = {module: parts for module, parts in base.modules.items() if parts[0].site not in inside}
    return replace(base, model_type=family, modules={**modules, **fused})


def _joined(base: BaseDescription, layer: int, names: Sequence[str]) -> tuple[Part, ...]:
    """Linears that are one below the other in one module."""
    sizes = [base.linears[name][1] for name in names]
    ends = itertools.accumulate(sizes)
    rows = (range(end - size, end) for size, end in zip(sizes, ends, strict=True))
    return tuple(Part(Site(layer, name), own) for name, own in zip(names, rows, strict=True))


def _some_methods(directory: Path, base: BaseDescription) -> dict[str, str]:
    linears = ("o_proj", "down_proj")
    made = [
        make_lora(directory / "lora", base, rank=4, seed=1),
        make_dora(directory / "dora", base, rank=3, seed=2, sites=linears),
        make_ia3(directory / "ia3", base, sites=linears, seed=3),
        make_prefix(directory / "prefix", base, num_virtual_tokens=6, seed=4),
        make_prompt(directory / "prompt", base, num_virtual_tokens=5, seed=5),
    ]
    return {path.name: f"{directory.name}/{path.name}" for path in made}


def _every_method(directory: Path, base: BaseDescription) -> dict[str, str]:
    for task, (_, make) in PLAIN.items():
        make(directory / task, base, Sizes())
    blocks: Mapping[str, tuple[str, dict[str, Any]]] = {
        "learned-scaling": ("seq_bn", {"scaling": "learned"}),
        "norms": ("double_seq_bn", {"ln_before": True, "ln_after": True}),
        "compacter": ("compacter", {}),
        "leaves-out": ("seq_bn", {"leave_out": [0], "non_linearity": "gelu"}),
    }
    for task, (preset, fields) in blocks.items():
        make_adapterhub(directory / task, base, preset, scale=0.3, **fields)
    make_lora(directory / "bfloat16", base, rank=3, dtype=torch.bfloat16)
    make_lora(directory / "template", base, rank=2, seed=9)
    (directory / "template" / "chat_template.jinja").write_text(f"<|im_start|>system\n{CHAT_TEMPLATE}")
    _saved_embedding(directory / "saved-embedding", base)
    return {path.name: f"{directory.name}/{path.name}" for path in sorted(directory.iterdir())}


def _saved_embedding(directory: Path, base: BaseDescription) -> None:
    shape = base.vocab_size, base.hidden_size
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(8)) * 0.5
    write_adapter(
        directory,
        lora_config(base, rank=4, sites=["q_proj"], modules_to_save=["embed_tokens"]),
        {
            **lora_tensors(base, rank=4, sites=["q_proj"]),
            f"{PREFIX}model.embed_tokens.weight": weight,
        },
    )


def _composed() -> dict[str, dict[str, float]]:
    return {
        task: {f"llama/{part}": weight for part, weight in parts.items()} for task, parts in COMPOSED.items()
    }
