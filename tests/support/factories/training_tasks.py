"""A task on a tiny real base, from a data file to the artifact, in a fraction of a second."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.settings.methods import AdapterSettings, LoraSettings
from manyhats.trainer.settings.settings import (
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    TrainSettings,
)
from support.factories.trainables import tiny_base

LABELS = ("red", "green", "blue")


@dataclass(frozen=True, slots=True, eq=False)
class TinyTask:
    """Files of a task, and the base they are trained on."""

    directory: Path
    model: LoadedModel

    @property
    def out(self) -> Path:
        return self.directory / "out"

    def settings(
        self,
        adapter: AdapterSettings | None = None,
        *,
        data: dict[str, Any] | None = None,
        save_dtype: Any = "float32",
        **optimization: Any,
    ) -> TrainSettings:
        """Two epochs of six steps, evaluated after each and scored by labels at the end."""
        return TrainSettings(
            task="colour",
            adapter=adapter or LoraSettings(rank=4, dropout=0.1),
            data=DataSettings(
                **{
                    "train": str(self.directory / "train.jsonl"),
                    "eval": str(self.directory / "eval.jsonl"),
                    "labels": LABELS,
                    **(data or {}),
                }
            ),
            optimization=OptimizationSettings(
                **{"batch_size": 4, "epochs": 2, "learning_rate": 5e-3, **optimization}
            ),
            model=ModelSettings(model="tiny", dtype="float32", device="cpu"),
            out=str(self.out),
            save_dtype=save_dtype,
        )

    def without_evaluation(self, **optimization: Any) -> TrainSettings:
        return self.settings(data={"eval": "", "labels": ()}, **optimization)


def make_tiny_task(directory: Path, *, num_train: int = 24, num_eval: int = 7) -> TinyTask:
    """Data whose completion is the colour that the prompt names by its first letter."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", num_train, 1), ("eval", num_eval, 2)):
        (directory / f"{name}.jsonl").write_text(_rows(count, seed))
    return TinyTask(directory, tiny_base("llama", "nf4").model)


def in_directory(task: TinyTask, directory: Path) -> TinyTask:
    """The same data, with an output directory elsewhere."""
    return replace(make_tiny_task(directory), model=task.model)


def _rows(count: int, seed: int) -> str:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        colour = rng.choice(LABELS)
        rows.append({"prompt": f"{'x' * rng.randint(1, 12)} {colour[0]}: ", "completion": colour})
    return "".join(json.dumps(row) + "\n" for row in rows)
