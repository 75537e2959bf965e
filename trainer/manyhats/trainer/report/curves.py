"""Curves of a run: the losses as a PNG, and for TensorBoard, if it is installed."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from manyhats.trainer.errors import OutputError
from manyhats.trainer.report.events import EvaluationReport, Event, Listener, StepReport, ignore

_SIZE_INCHES = (8.0, 5.0)
_DOTS_PER_INCH = 120
_SMOOTHING = 0.9


def loss_curve(
    title: str, steps: Sequence[StepReport], evaluations: Sequence[EvaluationReport], before: float | None
) -> bytes:
    """A PNG of the losses over the steps, and the learning rate below them.

    Args:
        title: what was trained.
        steps: their losses and the exponential mean are drawn.
        evaluations: held-out losses.
        before: the base's held-out loss, drawn for comparison; None for none.
    """
    # Not from pyplot, which would keep the figure and choose a window's backend.
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    numbers = [step.step for step in steps]
    values = [step.loss for step in steps]
    losses.plot(numbers, values, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    losses.plot(numbers, smoothed(values), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if evaluations:
        losses.plot(
            [evaluation.step for evaluation in evaluations],
            [evaluation.loss for evaluation in evaluations],
            color="tab:orange",
            marker="o",
            markersize=4,
            label="held out",
        )
    if before is not None:
        losses.axhline(before, color="tab:gray", linestyle="--", linewidth=1, label="held out, base")
    losses.set(title=title, ylabel="loss")
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot(numbers, [step.learning_rate for step in steps], color="tab:green", linewidth=1.2)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def smoothed(values: Sequence[float]) -> list[float]:
    """Running exponential means: ``m ← 0.9 m + 0.1 v``, divided by ``1 − 0.9ᵗ`` as in Adam."""
    means, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        means.append(mean / (1 - _SMOOTHING**count))
    return means


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
