"""The results of a training run: everything in its report, loss curve and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from manyhats.trainer.data.contents import PromptForm
from manyhats.trainer.data.dataset import DataCounts
from manyhats.trainer.data.head_task import HeadTask
from manyhats.trainer.memory.peak import PeakMemory
from manyhats.trainer.report.events import EvaluationReport, StepReport
from manyhats.trainer.report.fingerprint import settings_by_name
from manyhats.trainer.settings.settings import TrainSettings

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """How good a model is on the evaluation data.

    Attributes:
        loss: the mean over all targets, in nats, except of numbers.
        num_right: items whose label was predicted; None if no labels are scored.
        metrics: of a head's answers; see ``metrics``.
    """

    loss: float
    num_right: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The base alone, and with the trained adapter, on the same ``num_items`` rows.

    Attributes:
        labels: those that were scored as answers; empty for none.
        before: None for a head of classes, which the base does not have.
        label_tokens: the most tokens that an answer with one of them takes, its end included.
        form: how every item's prompt is made of one text; None if it is made in several ways, or of more.
    """

    num_items: int
    labels: tuple[str, ...]
    before: HeldOut | None
    after: HeldOut
    label_tokens: int = 0
    form: PromptForm | None = None

    def metrics(self, held_out: HeldOut) -> Mapping[str, float]:
        """What is told of a model besides its loss, by name."""
        right = held_out.num_right
        return held_out.metrics if right is None else {"accuracy": right / self.num_items}

    def accuracy(self, held_out: HeldOut) -> float | None:
        """The share of right labels."""
        return self.metrics(held_out).get("accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReport:
    """The base that was trained on.

    Attributes:
        name: the base that the artifact records.
        digest: of checkpoint and quantization, as the server reports it.
        digest_before, digest_after: of its weights in memory.
        num_parameters: in its matrices.
        linear_bytes: resident bytes of the quantized linears.
        dtype, device: those its products were computed in and on.
    """

    name: str
    digest: str
    digest_before: str
    digest_after: str
    num_parameters: int
    linear_bytes: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactReport:
    """The artifact as it was written.

    Attributes:
        digest: as the server reports it.
        library: the one that reads it, ``peft`` or ``adapter-transformers``.
        files: name → size and SHA-256.
        num_trainable: trained parameters; those of a prefix's MLP are not in the artifact.
        step: the one its parameters are from.
        learning_rate: the peak.
    """

    digest: str
    method: str
    library: str
    files: Mapping[str, tuple[int, str]]
    num_parameters: int
    num_trainable: int
    step: int
    learning_rate: float

    @property
    def num_bytes(self) -> int:
        """The size of all its files."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """A source as it was used: its rows of tokens, and what happened to the others."""

    num_rows: int
    counts: DataCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """A whole training run.

    Attributes:
        date: the one chat templates could write into the rows: the run's start, before any interrupt.
        head: what a head was to learn; None for a task that continues texts.
        train, held_out: the data; ``held_out`` is None without evaluation data.
        evaluation: None without evaluation data.
        stopped_early: the held-out loss no longer fell.
        peak_memory: the process's, during training.
        failures: checkpoints that could not be written.
    """

    settings: TrainSettings
    base: BaseReport
    artifact: ArtifactReport
    date: datetime
    head: HeadTask | None = None
    train: DataReport
    held_out: DataReport | None
    steps: tuple[StepReport, ...]
    evaluations: tuple[EvaluationReport, ...]
    evaluation: Evaluation | None
    stopped_early: bool
    peak_memory: PeakMemory
    failures: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step.num_tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Speed while taking steps, without evaluations and checkpoints."""
        seconds = sum(step.seconds for step in self.steps)
        return self.num_tokens / seconds if seconds else 0.0

    @property
    def duration_s(self) -> float:
        """Seconds of steps and evaluations, including those before an interrupt."""
        steps = sum(step.seconds for step in self.steps)
        return steps + sum(evaluation.seconds for evaluation in self.evaluations)

    @property
    def trainable_share(self) -> float:
        """Trained parameters as a fraction of the base's."""
        return self.artifact.num_trainable / self.base.num_parameters

    def to_json(self) -> bytes:
        """``report.json``."""
        content = {
            "format": _FORMAT,
            "task": self.settings.task,
            "method": self.artifact.method,
            "settings": settings_by_name(self.settings),
            "head": None if self.head is None else _head(self.head),
            "base": asdict(self.base),
            "artifact": {
                **asdict(self.artifact),
                "files": {
                    name: {"bytes": size, "sha256": sha256}
                    for name, (size, sha256) in self.artifact.files.items()
                },
                "bytes": self.artifact.num_bytes,
                "trainable_share": self.trainable_share,
            },
            "data": {
                **_data(self.train),
                "date": self.date.isoformat(),
                "eval": None if self.held_out is None else _data(self.held_out),
            },
            "speed": {
                "tokens": self.num_tokens,
                "tokens_per_second": self.tokens_per_s,
                "seconds": self.duration_s,
            },
            "peak_memory": asdict(self.peak_memory),
            "stopped_early": self.stopped_early,
            "failed_checkpoints": self.failures,
            "evaluation": None if self.evaluation is None else _evaluation(self.evaluation),
            "evaluations": [_without_task(evaluation) for evaluation in self.evaluations],
            "steps": [_without_task(step) for step in self.steps],
        }
        return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _data(report: DataReport) -> dict[str, Any]:
    return {"rows": report.num_rows, **asdict(report.counts)}


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "items": evaluation.num_items,
        "labels": evaluation.labels,
        "before": None if evaluation.before is None else _held_out(evaluation, evaluation.before),
        "after": _held_out(evaluation, evaluation.after),
    }


def _held_out(evaluation: Evaluation, held_out: HeldOut) -> dict[str, Any]:
    accuracy = evaluation.accuracy(held_out)
    metrics = evaluation.metrics(held_out)
    return {"loss": held_out.loss, "right": held_out.num_right, "accuracy": accuracy, **metrics}


def _head(task: HeadTask) -> dict[str, Any]:
    return {
        "kind": task.kind.value,
        "loss": task.loss.value,
        "classes": task.classes,
        "pooling": None if task.pooling is None else task.pooling.value,
    }


def _without_task(report: StepReport | EvaluationReport) -> dict[str, Any]:
    """Its fields except those that are the same in all."""
    return {name: value for name, value in asdict(report).items() if name not in ("task", "num_steps")}
