"""A picture of a load: when requests came, how long their first pieces took, and how latencies are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyhats.load.run import OK, Answer

_DOTS_PER_INCH = 120


def plot(answers: Sequence[Answer], path: Path) -> None:
    """Write a picture, in the format of the file's suffix.

    Raises:
        ImportError: there is no matplotlib.
        OSError, ValueError: the file cannot be written, or its suffix is of no format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    over_time, spread = figure.subplots(1, 2)
    answered = [answer for answer in answers if answer.outcome == OK]
    failed = [answer for answer in answers if not answer.pieces_s and answer.outcome != OK]
    over_time.scatter(
        [answer.due_s for answer in answered], [answer.first_s for answer in answered], s=9, label="answered"
    )
    if failed:
        over_time.scatter(
            [answer.due_s for answer in failed],
            [answer.ended_s - answer.due_s for answer in failed],
            s=9,
            marker="x",
            color="tab:red",
            label="failed",
        )
    over_time.set(xlabel="seconds into the load", ylabel="seconds to the first token", ylim=(0, None))
    over_time.legend()
    for label, values in (
        ("first token", [answer.first_s for answer in answered]),
        ("between tokens", [gap for answer in answered for gap in answer.gaps_s]),
    ):
        if values:
            spread.ecdf(values, label=label)
    spread.set(xlabel="seconds", ylabel="share of all", xscale="log")
    if answered:
        spread.legend()
    figure.savefig(path, dpi=_DOTS_PER_INCH)
