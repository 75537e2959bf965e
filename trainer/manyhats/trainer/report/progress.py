"""A training run's events for people: a bar per task on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from manyhats.trainer.data.dataset import counted, sentences
from manyhats.trainer.report.events import (
    CheckpointFailed,
    CheckpointReport,
    DataRead,
    EvaluationProgress,
    EvaluationReport,
    Event,
    Listener,
    RunBegan,
    RunEnded,
    ScoringProgress,
    StepReport,
)

_RECENT_STEPS = 20
_LINE_EVERY_S = 10.0


@contextmanager
def shown_training(stream: TextIO | None = None) -> Iterator[Listener]:
    """Shows the events it receives while entered; those of several tasks may alternate.

    Args:
        stream: None for stderr, so that stdout stays free for results.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield PlainLines(stream)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=5),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        yield _Bars(progress)


class Recent:
    """Loss and speed of a task's latest steps, at least one."""

    def __init__(self) -> None:
        self._steps: deque[StepReport] = deque(maxlen=_RECENT_STEPS)

    def add(self, step: StepReport) -> None:
        """Add a step."""
        self._steps.append(step)

    @property
    def tokens_per_s(self) -> float:
        """Speed while steps were taken."""
        seconds = sum(step.seconds for step in self._steps)
        return sum(step.num_tokens for step in self._steps) / seconds if seconds else 0.0

    @property
    def loss(self) -> float:
        """The latest step's loss."""
        return self._steps[-1].loss

    @property
    def smoothed_loss(self) -> float:
        """The mean over the steps' target tokens."""
        targets = sum(step.num_targets for step in self._steps)
        return sum(step.loss * step.num_targets for step in self._steps) / targets

    @property
    def losses(self) -> str:
        """Both, for people; the smoothed one is labelled, and only shown after more than one step."""
        smoothed = f" (mean of {len(self._steps)} steps {self.smoothed_loss:.4f})"
        return f"loss {self.loss:.4f}{smoothed if len(self._steps) > 1 else ''}"

    @property
    def seconds_left(self) -> float:
        """The remaining seconds at the pace of these steps."""
        last = self._steps[-1]
        mean = sum(step.seconds for step in self._steps) / len(self._steps)
        return (last.num_steps - last.step) * mean


class _Bars:
    """A bar per task, and one for its scoring."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._recent: dict[str, Recent] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case RunBegan():
                self._recent[event.task] = Recent()
                self._set(event.task, event.step, event.num_steps, "")
            case StepReport():
                recent = self._recent[event.task]
                recent.add(event)
                losses = f"loss {recent.loss:.4f}, mean {recent.smoothed_loss:.4f}"
                state = f"{losses}, {recent.tokens_per_s:,.0f} tokens/s"
                self._set(event.task, event.step, event.num_steps, state)
            case EvaluationProgress():
                self._set(f"{event.task}: held-out loss", event.done, event.total, "")
            case ScoringProgress():
                self._set(f"{event.task}: scoring", event.done, event.total, "")
            case _:
                for line in lines_of(event):
                    self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _set(self, name: str, done: int, total: int, state: str) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, state=state)
        self._progress.update(self._bars[name], completed=done, total=total, state=state)


class PlainLines:
    """A line for each notable event, and one for steps every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._recent: dict[str, Recent] = {}
        self._last_s: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        match event:
            case StepReport():
                lines = [self._step_line(event)]
            case ScoringProgress():
                lines = [self._scoring_line(event)]
            case _:
                lines = lines_of(event)
        for line in filter(None, lines):
            print(line, file=self._stream, flush=True)

    def _step_line(self, step: StepReport) -> str:
        recent = self._recent.setdefault(step.task, Recent())
        recent.add(step)
        if step.step not in (1, step.num_steps) and not self._is_time(step.task):
            return ""
        self._last_s[step.task] = time.monotonic()
        return (
            f"{step.task}: step {step.step}/{step.num_steps}, {recent.losses}, "
            f"{recent.tokens_per_s:,.0f} tokens/s, {duration(recent.seconds_left)} left"
        )

    def _scoring_line(self, event: ScoringProgress) -> str:
        name = f"{event.task}: scoring"
        if event.done != event.total and not self._is_time(name):
            return ""
        self._last_s[name] = time.monotonic()
        return f"{event.task}: evaluated by {event.done} of {event.total} requests"

    def _is_time(self, name: str) -> bool:
        return time.monotonic() - self._last_s.setdefault(name, time.monotonic()) >= _LINE_EVERY_S


def lines_of(event: Event) -> list[str]:
    """An event as lines; none for those shown otherwise or not at all."""
    if isinstance(event, DataRead):
        data = "held-out data" if event.is_held_out else "training data"
        warning = "warning: " if event.counts.ignored else ""
        return [f"{warning}{event.task}: {data}: {sentence}" for sentence in sentences(event.counts)]
    line = line_of(event)
    return [line] if line else []


def line_of(event: Event) -> str:
    """An event as a line; empty for those shown otherwise or not at all."""
    match event:
        case RunBegan():
            resumed = f" from step {event.step}" if event.step else ""
            steps, parameters = (
                counted(event.num_steps, "step"),
                counted(event.num_trainable, "trainable parameter"),
            )
            return f"{event.task}: {steps}{resumed}, {parameters}"
        case EvaluationReport():
            best = ", the best so far" if event.is_best else ""
            return f"{event.task}: step {event.step}, held-out loss {event.loss:.4f}{best}"
        case CheckpointReport():
            return f"{event.task}: step {event.step}, checkpoint {event.path}"
        case CheckpointFailed():
            return f"{event.task}: step {event.step}, NO CHECKPOINT: {event.error}; training continues"
        case RunEnded(stopped_early=True):
            return f"{event.task}: stopped early at step {event.step}: the held-out loss no longer falls"
        case _:
            return ""


def duration(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
