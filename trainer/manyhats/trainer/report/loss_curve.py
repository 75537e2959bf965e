"""The loss curve as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from manyhats.trainer.report.events import EvaluationReport, StepReport

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
    losses.set(title=title, ylabel="loss (nats per token)")
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
