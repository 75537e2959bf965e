"""``python -m benchmarks.training.heads``: a head of classes trained here, beside PEFT and transformers' Trainer.

The task is WordNet's: a noun's definition → its category, one of 25 (see ``examples.wordnet``). Both train the same
LoRA with a fresh head on the same base, with the same rows, batch size, number of steps, learning rate and schedule.
Here the held-out rows are read by the engine, as a server reads them; there by PEFT's own model. The trainer here
drops out nothing of the base; PEFT's does, as the base's config says, unless that is set to 0: then the settings are
the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LIMIT = 0.01
"""How far the accuracies may lie apart."""
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_OURS, _SAME, _USUAL = "manyhats", "PEFT without dropout", "PEFT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One training: what it gets right of the held-out rows, and how long its steps took."""

    accuracy: float
    f1: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per training, and the means; 1 if the accuracies are more than a point apart."""
    options = _parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before any library starts its threads
    found: dict[str, list[Trained]] = {name: [] for name in options.system or (_OURS, _SAME, _USUAL)}
    with TemporaryDirectory(prefix="manyhats-bench-") as name:
        directory = Path(name)
        write_rows(directory, options)
        for seed in range(options.seeds):
            for system, runs in found.items():
                runs.append(_trained(system, directory, options, seed))
                print(_line(f"seed {seed}, {system}", runs[-1:]), flush=True)
    for system, runs in found.items():
        print(_line(f"mean, {system}", runs))
    if not {_OURS, _SAME} <= found.keys():
        return 0
    ours, theirs = (statistics.mean(run.accuracy for run in found[system]) for system in (_OURS, _SAME))
    print(f"accuracy: {100 * (ours - theirs):+.2f} points")
    return 0 if abs(ours - theirs) <= LIMIT else 1


def _trained(system: str, directory: Path, options: argparse.Namespace, seed: int) -> Trained:
    if system == _OURS:
        return train_here(directory, options, seed)
    return train_with_peft(directory, options, seed, has_dropout=system == _USUAL)


def write_rows(directory: Path, options: argparse.Namespace) -> None:
    """``train.jsonl`` and ``eval.jsonl``: definitions with their categories."""
    from examples.wordnet import definition_rows

    rows = definition_rows(num_train=options.num_train, num_eval=options.num_eval, path=options.wordnet)
    for name, part in (("train", rows.train), ("eval", rows.eval)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(text)


def train_here(directory: Path, options: argparse.Namespace, seed: int) -> Trained:
    """``manyhats train lora --head classification``."""
    from manyhats.trainer.settings.settings_file import make_settings
    from manyhats.trainer.train import train

    settings = make_settings(
        {
            "method": "lora",
            "task": "wordnet",
            "head": "classification",
            "data": str(directory / "train.jsonl"),
            "eval": str(directory / "eval.jsonl"),
            "out": str(directory / f"here-{seed}"),
            "model": options.model,
            "rank": options.rank,
            "alpha": 2 * options.rank,
            "batch_size": options.batch_size,
            "epochs": options.epochs,
            "learning_rate": options.learning_rate,
            "seed": seed,
            "device": "cpu",
            "dtype": "float32",
            "gradient_checkpointing": False,
            "num_threads": options.threads,
        }
    )
    report = train(settings)
    assert report.evaluation is not None
    metrics = report.evaluation.metrics(report.evaluation.after)
    seconds = sum(step.seconds for step in report.steps)
    return Trained(accuracy=metrics["accuracy"], f1=metrics["f1"], seconds=seconds)


def train_with_peft(directory: Path, options: argparse.Namespace, seed: int, *, has_dropout: bool) -> Trained:
    """PEFT's LoRA on transformers' model, trained by transformers' Trainer."""
    import peft
    import torch

    from manyhats.engine.checkpoints.fetch import locate_model
    from manyhats.engine.home import default_home

    torch.set_num_threads(options.threads)
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    checkpoint = locate_model(options.model, default_home()).directory
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows, held_out = (_read(directory / f"{name}.jsonl") for name in ("train", "eval"))
    classes = sorted({row["label"] for row in rows})
    transformers.set_seed(seed)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=len(classes), dtype=torch.float32, **({} if has_dropout else _NO_DROPOUT)
    )
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=_modules(model), task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config)
    steps = math.ceil(len(rows) / options.batch_size) * options.epochs
    with TemporaryDirectory() as output, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(
            model=model,
            args=_arguments(output, options, steps, seed),
            train_dataset=[{**tokenizer(row["text"]), "labels": classes.index(row["label"])} for row in rows],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        began_s = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began_s
    return _measured(model, tokenizer, held_out, classes, seconds)


def _arguments(output: str, options: argparse.Namespace, steps: int, seed: int) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=options.batch_size,
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(0.03 * steps)),
        seed=seed,
        train_sampling_strategy="group_by_length",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def _modules(model: Any) -> list[str]:
    """Every linear of the layers, by its path: what the trainer here adapts by default."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer." in name
    ]


def _measured(
    model: Any, tokenizer: Any, held_out: Sequence[Mapping[str, str]], classes: Sequence[str], seconds: float
) -> Trained:
    import numpy as np
    import torch

    from manyhats.trainer.report.metrics import of_classes

    model.train(False)
    predicted: list[int] = []
    with torch.no_grad():
        for first in range(0, len(held_out), 64):
            texts = [row["text"] for row in held_out[first : first + 64]]
            logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
            predicted += logits.argmax(-1).tolist()
    metrics = of_classes(np.array(predicted), np.array([classes.index(row["label"]) for row in held_out]))
    return Trained(accuracy=metrics["accuracy"], f1=metrics["f1"], seconds=seconds)


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _line(name: str, runs: Sequence[Trained]) -> str:
    accuracy, f1, seconds = (
        statistics.mean(getattr(run, field) for run in runs) for field in ("accuracy", "f1", "seconds")
    )
    return f"{name}: accuracy {accuracy:.2%}, F1 {f1:.2%}, {seconds:.0f} s"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from examples.wordnet import DATA_FILE

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--wordnet", type=Path, default=DATA_FILE, metavar="FILE", help="WordNet's data.noun")
    parser.add_argument("--system", action="append", choices=(_OURS, _SAME, _USUAL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=9000)
    parser.add_argument("--num-eval", type=int, default=3000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
