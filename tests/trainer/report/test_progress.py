from __future__ import annotations

import importlib.util
import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.report import progress
from manyhats.trainer.report.curves import tensorboard_curves
from manyhats.trainer.report.events import (
    CheckpointFailed,
    CheckpointReport,
    EvaluationProgress,
    EvaluationReport,
    Event,
    RunBegan,
    RunEnded,
    ScoringProgress,
    StepReport,
    all_of,
    ignore,
)
from manyhats.trainer.report.progress import PlainLines, Recent, duration, shown_training


def step(
    number: int, *, task: str = "t", loss: float = 1.0, targets: int = 10, seconds: float = 2.0
) -> StepReport:
    return StepReport(
        task=task,
        step=number,
        num_steps=100,
        epoch=number / 50,
        loss=loss,
        learning_rate=0.1,
        grad_norm=0.5,
        num_tokens=1000,
        num_targets=targets,
        seconds=seconds,
    )


EVENTS: list[Event] = [
    RunBegan(task="t", step=3, num_steps=100, num_trainable=12345),
    step(4),
    EvaluationProgress(task="t", done=10, total=10),
    EvaluationReport(task="t", step=4, loss=1.25, is_best=True, seconds=1.0),
    CheckpointReport(task="t", step=4, path=Path("out/step-000004")),
    CheckpointFailed(task="t", step=5, error=CheckpointError("no space")),
    ScoringProgress(task="t", done=20, total=20),
    RunEnded(task="t", step=100, stopped_early=True),
    RunEnded(task="t", step=100, stopped_early=False),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_at_a_terminal_what_matters_is_a_line_each() -> None:
    stream = io.StringIO()
    with shown_training(stream) as listener:
        for event in (*EVENTS[:1], step(1), *EVENTS[1:], step(100)):
            listener(event)
    assert stream.getvalue().splitlines() == [
        "t: 100 steps from step 3, 12,345 trainable parameters",
        "t: step 1/100, loss 1.0000, 500 tokens/s, 3:18 left",
        "t: step 4, held-out loss 1.2500, the best so far",
        "t: step 4, checkpoint out/step-000004",
        "t: step 5, NO CHECKPOINT: no space; training continues",
        "t: evaluated by 20 of 20 requests",
        "t: stopped early at step 100: the held-out loss no longer falls",
        "t: step 100/100, loss 1.0000 (mean of 3 steps 1.0000), 500 tokens/s, 0:00 left",
    ]


def test_one_of_a_thing_is_no_more() -> None:
    stream = io.StringIO()
    with shown_training(stream) as listener:
        listener(RunBegan(task="t", step=0, num_steps=1, num_trainable=1))
    assert stream.getvalue() == "t: 1 step, 1 trainable parameter\n"


def test_steps_are_a_line_every_ten_seconds_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    lines = PlainLines(stream)
    for number in range(1, 31):
        for task in ("a", "b"):
            lines(step(number, task=task))
        now += 1.0
    shown = [line.split(",")[0] for line in stream.getvalue().splitlines()]
    assert shown == [f"{task}: step {number}/100" for number in (1, 11, 21) for task in ("a", "b")]


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left() -> None:
    stream = Terminal()
    with shown_training(stream) as listener:
        for event in EVENTS:
            listener(event)
        listener(step(50, task="t", loss=0.5))
    text = stream.getvalue()
    for part in ("loss", "tokens/s", "50/100", "held-out loss 1.2500", "NO CHECKPOINT: no space", "scoring"):
        assert part in text, part


def test_the_latest_loss_is_shown_beside_the_mean_over_recent_targets() -> None:
    recent = Recent()
    recent.add(step(1, loss=1.0, targets=30))
    recent.add(step(2, loss=3.0, targets=10, seconds=4.0))
    assert recent.loss == 3.0
    assert recent.smoothed_loss == pytest.approx(1.5)
    assert recent.losses == "loss 3.0000 (mean of 2 steps 1.5000)"
    assert recent.tokens_per_s == pytest.approx(2000 / 6)
    assert recent.seconds_left == pytest.approx(98 * 3)
    for number in range(3, 100):
        recent.add(step(number, loss=2.0))
    assert recent.smoothed_loss == pytest.approx(2.0), "the first steps are forgotten"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_listener_hears_every_event() -> None:
    first: list[Event] = []
    second: list[Event] = []
    listener = all_of(first.append, ignore, second.append)
    for event in EVENTS:
        listener(event)
    assert first == second == EVENTS


# TensorBoard


class FakeWriter:
    """The part of ``SummaryWriter`` that is used."""

    made: list[FakeWriter]

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.scalars: list[tuple[str, float, int]] = []
        self.is_closed = False
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


def test_tensorboard_gets_the_curves_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeWriter.made = []
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with tensorboard_curves(tmp_path / "tensorboard") as listener:
        for event in EVENTS:
            listener(event)
    (writer,) = FakeWriter.made
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.is_closed
    assert writer.scalars == [
        ("train/loss", 1.0, 4),
        ("train/learning_rate", 0.1, 4),
        ("train/grad_norm", 0.5, 4),
        ("train/tokens_per_second", 500.0, 4),
        ("eval/loss", 1.25, 4),
    ]


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with tensorboard_curves(tmp_path / "tensorboard") as listener:
        listener(step(1))
    assert list(tmp_path.iterdir()) == []
