"""The trainer's errors.

TrainerError
├── SettingError        a setting that cannot be trained with; names it
├── DataError           a row of the data; names file and line
├── BaseError           a base model that this method cannot be trained on
├── DivergedError       the loss is no longer finite; the last good checkpoint is kept
├── CheckpointError     a checkpoint that cannot be written, read or resumed from
├── OutputError         an output that cannot be written, such as on a full disk
└── RegistrationError   a server that refuses the artifact, which stays where it is
"""

from __future__ import annotations

from pathlib import Path


class TrainerError(Exception):
    """Any error the trainer raises on purpose."""


class SettingError(TrainerError):
    """A setting is wrong; ``setting`` is its name as in ``TrainSettings``."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting
        self.message = message


class DataError(TrainerError):
    """A row, or a whole file, cannot be trained on; ``line`` counts from 1, None if the whole file is meant."""

    def __init__(self, source: str, line: int | None, message: str) -> None:
        super().__init__(f"{source}:{line}: {message}" if line is not None else f"{source}: {message}")
        self.source = source
        self.line = line


class BaseError(TrainerError):
    """The base model and the method are incompatible."""


class DivergedError(TrainerError):
    """The loss of a step is not finite; ``step`` counts from 1."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written"
        super().__init__(f"the loss of step {step} is not finite: lower the learning rate; {kept}")
        self.step = step
        self.checkpoint = checkpoint


class CheckpointError(TrainerError):
    """A checkpoint cannot be written, read, or continued with these settings."""


class OutputError(TrainerError):
    """A file of the results cannot be written."""


class RegistrationError(TrainerError):
    """A server refused an artifact; ``directory`` holds it, and the client's error is the cause."""

    def __init__(self, task: str, directory: Path, target: str, message: str) -> None:
        super().__init__(
            f"{message}; the artifact is in {directory},"
            f" and `manyhats adapters upload {task} {directory} --server {target}` sends it"
        )
        self.task = task
        self.directory = directory
