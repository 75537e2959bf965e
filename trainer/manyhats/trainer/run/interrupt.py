"""SIGINT and SIGTERM during training: the current step is finished, and what was learned is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.report.events import EvaluationProgress, Event, ScoringProgress, TokenizingProgress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Keepable(Protocol):
    """A run, as far as interrupts are concerned."""

    @property
    def is_done(self) -> bool:
        """Whether no step follows."""
        ...

    def save_checkpoint(self) -> Path:
        """Write a checkpoint."""
        ...


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted by the user, or by a signal to end; a command exits with 130.

    Attributes:
        checkpoints: those written for it, to resume from.
    """

    def __init__(self, checkpoints: Sequence[Path]) -> None:
        kept = ", ".join(str(path) for path in checkpoints)
        super().__init__(f"interrupted; can be resumed from {kept}" if kept else "interrupted")
        self.checkpoints = tuple(checkpoints)


class StopRequest:
    """Set by a first SIGINT or SIGTERM; a second one raises ``KeyboardInterrupt`` at once.

    Attributes:
        is_set: a first signal has come.
        is_urgent: a second signal has come.
    """

    def __init__(self) -> None:
        self.is_set = False
        self.is_urgent = False

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle both signals while this is entered; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._received) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            self.is_urgent = True
            raise KeyboardInterrupt
        self.is_set = True

    def __call__(self, event: Event) -> None:
        """Listen to a run: tokenization and evaluations take long, and can be repeated.

        Raises:
            KeyboardInterrupt: it is set.
        """
        if self.is_set and isinstance(event, TokenizingProgress | EvaluationProgress | ScoringProgress):
            raise KeyboardInterrupt

    def check(self, runs: Sequence[Keepable]) -> None:
        """Check for a signal; called between two steps.

        Raises:
            TrainingInterrupted: it is set; each unfinished run has a checkpoint.
            CheckpointError: it is set, and a checkpoint cannot be written.
        """
        if self.is_set:
            raise TrainingInterrupted(keep(runs))


def keep(runs: Sequence[Keepable]) -> list[Path]:
    """Write a checkpoint of each unfinished run.

    Raises:
        CheckpointError: one cannot be written; the others were.
    """
    written: list[Path] = []
    failure: CheckpointError | None = None
    for run in runs:
        try:
            if not run.is_done:
                written.append(run.save_checkpoint())
        except CheckpointError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return written
