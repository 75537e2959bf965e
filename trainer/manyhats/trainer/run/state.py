"""A run so far, its whole state at one step, and the state's files: safetensors and JSON, nothing that runs code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.report.events import EvaluationReport, StepReport
from manyhats.trainer.report.fingerprint import Fingerprint
from manyhats.trainer.run.optimizer import OptimizerState

STATE_FILE = "run.json"
PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Everything a run did.

    Attributes:
        artifact_step: the step whose parameters the adapter has now.
        stopped_early: whether it ended because the held-out loss no longer fell.
        learning_rate: the peak.
        failures: checkpoints that could not be written.
    """

    steps: tuple[StepReport, ...]
    evaluations: tuple[EvaluationReport, ...]
    artifact_step: int
    stopped_early: bool
    learning_rate: float
    failures: tuple[str, ...]


class RunHistory:
    """Grows by one step or evaluation at a time; its state depends only on them.

    Args:
        steps: those before, in order.
        evaluations: the same.
    """

    def __init__(
        self, steps: Sequence[StepReport] = (), evaluations: Sequence[EvaluationReport] = ()
    ) -> None:
        self._steps = list(steps)
        self._evaluations = list(evaluations)

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """All steps."""
        return tuple(self._steps)

    @property
    def evaluations(self) -> tuple[EvaluationReport, ...]:
        """All evaluations."""
        return tuple(self._evaluations)

    @property
    def num_steps(self) -> int:
        """The number of steps taken."""
        return len(self._steps)

    def add_step(self, step: StepReport) -> None:
        """Add the next step."""
        self._steps.append(step)

    def add_evaluation(self, evaluation: EvaluationReport) -> None:
        """Add the next evaluation."""
        self._evaluations.append(evaluation)

    @property
    def best(self) -> EvaluationReport | None:
        """The evaluation of the lowest loss, the first of equals; None before any."""
        return next((each for each in reversed(self._evaluations) if each.is_best), None)

    @property
    def is_at_best(self) -> bool:
        """Whether the latest step was evaluated and is the best so far."""
        return self.best is not None and self.best.step == self.num_steps

    @property
    def is_evaluated(self) -> bool:
        """Whether the latest step was evaluated."""
        return bool(self._evaluations) and self._evaluations[-1].step == self.num_steps

    def is_better(self, loss: float) -> bool:
        """Whether a held-out loss is lower than all before."""
        return self.best is None or loss < self.best.loss

    def has_no_better(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations brought no improvement; never if that is 0."""
        last = self._evaluations[-patience:] if patience else []
        return len(last) == patience > 0 and not any(each.is_best for each in last)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RunState:
    """A run after some step; what follows depends only on this, its settings and its data.

    Attributes:
        parameters: the adapter's, by name.
        optimizer: its state.
        best: the parameters at the best evaluation; empty if they are not kept.
        steps: every step so far.
        evaluations: every evaluation so far.
        is_done: whether no step follows.
    """

    parameters: Mapping[str, Tensor]
    optimizer: OptimizerState
    best: Mapping[str, Tensor]
    steps: tuple[StepReport, ...]
    evaluations: tuple[EvaluationReport, ...]
    is_done: bool

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return len(self.steps)


def encode(state: RunState, fingerprint: Fingerprint, date: datetime | None = None) -> dict[str, bytes]:
    """The files of a checkpoint by name; ``run.json`` has the digests of the others, and the date of the rows."""
    tensors = {
        PARAMETERS_FILE: save(dict(state.parameters)),
        OPTIMIZER_FILE: save(dict(state.optimizer.tensors)),
        **({BEST_FILE: save(dict(state.best))} if state.best else {}),
    }
    content = {
        "format": _FORMAT,
        "step": state.step,
        "is_done": state.is_done,
        "date": None if date is None else date.isoformat(),
        "fingerprint": fingerprint,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()},
        "optimizer_numbers": state.optimizer.numbers,
        "steps": _columns(StepReport, [asdict(step) for step in state.steps]),
        "evaluations": _columns(EvaluationReport, [asdict(evaluation) for evaluation in state.evaluations]),
    }
    return {**tensors, STATE_FILE: json.dumps(content, allow_nan=False).encode()}


def decode_header(name: str, content: bytes) -> dict[str, Any]:
    """``run.json`` of the checkpoint ``name``, checked for its format.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        header = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{name}/{STATE_FILE}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(f"{name}/{STATE_FILE}: not a checkpoint of this version")
    return header


def decode(name: str, files: Mapping[str, bytes]) -> RunState:
    """The state of the checkpoint ``name``.

    Raises:
        CheckpointError: a file is damaged.
    """
    header = decode_header(name, files[STATE_FILE])
    try:
        for file, sha256 in header["files"].items():
            if hashlib.sha256(files[file]).hexdigest() != sha256:
                raise CheckpointError(f"{name}/{file}: damaged: its content has changed since it was written")
        return RunState(
            parameters=load(files[PARAMETERS_FILE]),
            optimizer=OptimizerState(load(files[OPTIMIZER_FILE]), header["optimizer_numbers"]),
            best=load(files[BEST_FILE]) if BEST_FILE in header["files"] else {},
            steps=tuple(StepReport(**row) for row in _rows(header["steps"])),
            evaluations=tuple(EvaluationReport(**row) for row in _rows(header["evaluations"])),
            is_done=header["is_done"],
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{name}: damaged: {error!r}") from error


def _columns(kind: type[StepReport | EvaluationReport], rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list per field: a run has thousands of steps."""
    return {field.name: [row[field.name] for row in rows] for field in fields(kind)}


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
