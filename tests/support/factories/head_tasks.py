"""Tasks that read texts, on tiny bases: data that is trivial to tell apart, and how heads are trained on them."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.trainer.settings.head import HeadSettings
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from manyhats.trainer.settings.settings import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    TrainSettings,
)
from support.factories.tiny_encoders import AUTO, ENCODERS, make_encoder
from support.factories.tiny_models import make_checkpoint

METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4),
    "dora": LoraSettings(rank=4, use_dora=True),
    "ia3": Ia3Settings(),
    "bottleneck": BottleneckSettings(reduction_factor=4),
    "prefix": PrefixSettings(num_virtual_tokens=4, projection_size=8),
    "prompt": PromptSettings(num_virtual_tokens=4),
    "ptuning": PTuningSettings(num_virtual_tokens=4, encoder_size=8),
}
HEADS = ("classification", "tokens", "embedding")
WORDS = ("sun", "moon", "star", "rain")
_CLASSES = {"sun": "bright", "moon": "dark", "star": "dark", "rain": "wet"}


@dataclass(frozen=True, slots=True, eq=False)
class HeadBase:
    """A tiny random base, and its checkpoint."""

    model: LoadedModel
    directory: Path


@cache
def head_base(family: str, quantization: Any = "none") -> HeadBase:
    """A random base of a family, an encoder or a decoder."""
    directory = Path(tempfile.mkdtemp(prefix="manyhats-head-"))
    if family in ENCODERS:
        checkpoint = make_encoder(directory / "model", family, seed=8, auto=AUTO.get(family, "AutoModel"))
    else:
        kv_heads = {} if family in ("llama", "qwen2") else {"kv_heads": 4}
        checkpoint = make_checkpoint(directory / "model", family, seed=8, **kv_heads)
    model = load_model(
        str(checkpoint), quantization=quantization, dtype=torch.float32, home=directory / "home"
    )
    return HeadBase(model, checkpoint)


def head_rows(head: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose labels follow from single words."""
    rng = random.Random(seed)
    return [_ROWS[head](rng) for _ in range(count)]


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def head_settings(
    directory: Path,
    head: str,
    adapter: AdapterSettings | None = None,
    *,
    rows: list[dict[str, Any]] | None = None,
    eval_rows: list[dict[str, Any]] | None = None,
    data: dict[str, Any] | None = None,
    of_head: dict[str, Any] | None = None,
    **optimization: Any,
) -> TrainSettings:
    """A few epochs on trivial data, written to a directory; the artifact goes to ``out`` in it."""
    train = write_rows(rows or head_rows(head, 48, 1), directory / f"{head}.jsonl")
    held_out = write_rows(eval_rows or head_rows(head, 16, 2), directory / f"{head}-eval.jsonl")
    return TrainSettings(
        task="heads",
        adapter=adapter or METHODS["lora"],
        head=HeadSettings(kind=head, **(of_head or {})),  # type: ignore[arg-type]
        data=DataSettings(**{"train": str(train), "eval": str(held_out), **(data or {})}),
        optimization=OptimizationSettings(
            **{"batch_size": 8, "epochs": 6, "learning_rate": 1e-2, **optimization}
        ),
        model=ModelSettings(model="tiny", quantization="none", dtype="float32", device="cpu"),
        out=str(directory / "out"),
    )


def _classification(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(WORDS)
    return {"text": f"{'x' * rng.randint(1, 9)} {word}", "label": _CLASSES[word]}


def _tokens(rng: random.Random) -> dict[str, Any]:
    words = [rng.choice([*WORDS, "Max", "Eva"]) for _ in range(rng.randint(2, 6))]
    return {"tokens": words, "tags": ["B-PER" if word[0].isupper() else "O" for word in words]}


def _embedding(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(WORDS)
    other = rng.choice([each for each in WORDS if each != word])
    return {"query": word, "positive": word.upper(), "negatives": [other.upper()]}


_ROWS = {"classification": _classification, "tokens": _tokens, "embedding": _embedding}
