"""Trains the encoder's example adapters: ``python -m examples.encoder.train [--output DIR] [TASK …]``.

Each is trained and measured on held-out rows by the trainer, as ``manyhats train --head … --eval …`` does, and its
model card is the trainer's; ``results.json`` has the numbers of all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from examples.encoder.calls import BASE_ALIAS
from examples.encoder.results import EncoderResult, read_results, table, write_result
from examples.encoder.tasks import ENCODER_TASKS, EncoderTask, Row
from examples.tasks.task import Split
from examples.training import print_progress
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.trainer.report.report import TrainingReport
from manyhats.trainer.settings.settings import DataSettings, ModelSettings, TrainSettings
from manyhats.trainer.train import train

_ROOT = Path(__file__).parent
_CARD = "README.md"


def main() -> None:
    """Train the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Train the encoder's example adapters.")
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"any of {', '.join(ENCODER_TASKS)}; all by default"
    )
    parser.add_argument("--output", type=Path, default=_ROOT, help="gets adapters/ and results.json")
    parser.add_argument("--threads", type=int, default=0, help="0 is one per processor")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tasks if name not in ENCODER_TASKS]
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}")
    train_all(
        [ENCODER_TASKS[name] for name in arguments.tasks or ENCODER_TASKS],
        arguments.output,
        arguments.threads,
    )
    print("\n".join(table(read_results(arguments.output))))


def train_all(tasks: Sequence[EncoderTask], output: Path = _ROOT, num_threads: int = 0) -> None:
    """Train tasks and write their adapters and results; in float32, in which a small encoder is served."""
    if num_threads:
        torch.set_num_threads(num_threads)
    options = ModelSettings(
        model=BASE_ALIAS,
        quantization="none",
        dtype="float32",
        gradient_checkpointing=False,
        num_threads=num_threads,
    )
    base = load_model(BASE_ALIAS, quantization="none", dtype=torch.float32)
    for task in tasks:
        _train_task(base, task, output, options)


def _train_task(base: LoadedModel, task: EncoderTask, output: Path, options: ModelSettings) -> None:
    directory = output / "adapters" / task.name
    with TemporaryDirectory(prefix="manyhats-examples-") as scratch:
        data, held_out = write_data(task, Path(scratch))
        out = Path(scratch) / "out"
        settings = TrainSettings(
            task=task.name,
            adapter=task.adapter,
            data=DataSettings(train=str(data), eval=str(held_out), labels=task.classes),
            optimization=task.training,
            head=task.head,
            model=options,
            out=str(out),
            save_dtype="bfloat16",
        )
        report = train(settings, base, listener=print_progress)
        _keep(report, out, directory)
    write_result(output, task.name, _result(report, directory))
    print(f"{task.name}: steps took {sum(step.seconds for step in report.steps):.1f} s", flush=True)


def write_data(task: EncoderTask, directory: Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl``, as the trainer reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    files = directory / "train.jsonl", directory / "eval.jsonl"
    for path, split in zip(files, Split, strict=True):
        path.write_text("".join(_line(row) for row in task.rows(split)), encoding="utf-8")
    return files


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _keep(report: TrainingReport, out: Path, directory: Path) -> None:
    """The artifact's files, its card, and the curve that this shows."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "training").mkdir(parents=True)
    for name in (*report.artifact.files, _CARD, "training/loss.png"):
        shutil.copy(out / name, directory / name)


def _result(report: TrainingReport, directory: Path) -> EncoderResult:
    evaluation = report.evaluation
    assert evaluation is not None  # rows were held out
    before = evaluation.before
    return EncoderResult(
        method=report.artifact.method.replace("_", " "),
        head=report.settings.head.kind,
        num_items=evaluation.num_items,
        before=None if before is None else _rounded(evaluation.metrics(before)),
        after=_rounded(evaluation.metrics(evaluation.after)),
        num_bytes=sum((directory / name).stat().st_size for name in report.artifact.files),
        seconds=round(report.duration_s, 1),
    )


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items()}


if __name__ == "__main__":
    main()
