"""Curves for TensorBoard, if it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manyhats.trainer.errors import OutputError
from manyhats.trainer.report.events import EvaluationReport, Event, Listener, StepReport, ignore


@contextmanager
def tensorboard_curves(directory: Path) -> Iterator[Listener]:
    """Write the events of steps and evaluations; does nothing without TensorBoard.

    A resumed run continues in another file of the same directory; steps keep their numbers.

    Raises:
        OutputError: the directory cannot be written.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield ignore
        return
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer: Any = SummaryWriter(log_dir=str(directory))
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    try:
        yield lambda event: _add(writer, event)
    finally:
        writer.close()


def _add(writer: Any, event: Event) -> None:
    match event:
        case StepReport():
            writer.add_scalar("train/loss", event.loss, event.step)
            writer.add_scalar("train/learning_rate", event.learning_rate, event.step)
            writer.add_scalar("train/grad_norm", event.grad_norm, event.step)
            writer.add_scalar("train/tokens_per_second", event.num_tokens / event.seconds, event.step)
        case EvaluationReport():
            writer.add_scalar("eval/loss", event.loss, event.step)
        case _:
            pass
