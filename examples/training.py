"""Training of one example task with the trainer, as ``manyhats train`` does it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.data import write_data
from examples.tasks.task import ExampleTask
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.report.events import Event, StepReport
from manyhats.trainer.settings.methods import AdapterSettings
from manyhats.trainer.settings.settings import DataSettings, ModelSettings, TrainSettings
from manyhats.trainer.train import train

_NUM_RECENT = 10


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run did.

    Attributes:
        library: that trained it, ``manyhats`` or ``PEFT``.
        num_tokens: of all steps, those of the chat template too.
        last_loss: the mean of the last ten steps.
    """

    library: str
    num_steps: int
    num_tokens: int
    last_loss: float
    duration_s: float


def train_example(
    base: LoadedModel, task: ExampleTask, adapter: AdapterSettings, directory: Path, *, options: ModelSettings
) -> TrainingResult:
    """Train a task's adapter and write its config and weights, matrices in bfloat16.

    Args:
        base: loaded by ``options``.
        task: its data, and how it is trained.
        adapter: what is trained.
        directory: what is written; another artifact in it goes.
        options: which base it is and how it is computed.
    """
    with TemporaryDirectory(prefix="manyhats-examples-") as scratch:
        data, _ = write_data(task, Path(scratch) / "data")
        out = Path(scratch) / "out"
        settings = TrainSettings(
            task=task.name,
            adapter=adapter,
            data=DataSettings(train=str(data), chat=True),
            optimization=task.training,
            model=options,
            out=str(out),
            save_dtype="bfloat16",
        )
        report = train(settings, base, listener=print_progress)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name in report.artifact.files:
            shutil.copy(out / name, directory / name)
    losses = [step.loss for step in report.steps]
    return TrainingResult("manyhats", len(losses), report.num_tokens, recent(losses), report.duration_s)


def recent(losses: Sequence[float]) -> float:
    """The mean of the last ten."""
    last = losses[-_NUM_RECENT:]
    return sum(last) / len(last)


def print_progress(event: Event) -> None:
    """Show every tenth step."""
    if isinstance(event, StepReport) and (event.step % 10 == 0 or event.step == event.num_steps):
        print(f"{event.task}: step {event.step}/{event.num_steps}, loss {event.loss:.4f}", flush=True)
