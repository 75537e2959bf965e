from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.report.events import EvaluationProgress, Event, StepReport, all_of
from manyhats.trainer.run.interrupt import StopRequest, TrainingInterrupted
from manyhats.trainer.train import take_turns
from support.fakes.training import FakeAdapter, make_dataset, make_run, make_train_settings, run_to_end


def newest(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "training/checkpoints").glob("*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_leaves_a_checkpoint_of_each_run(
    number: signal.Signals, tmp_path: Path
) -> None:
    def send(event: Event) -> None:
        if isinstance(event, StepReport) and (event.task, event.step) == ("b", 3):
            os.kill(os.getpid(), number)

    runs = [
        make_run(make_train_settings(tmp_path / task, task=task), adapter=FakeAdapter(), listener=send)
        for task in ("a", "b")
    ]
    with StopRequest().installed() as stop, pytest.raises(TrainingInterrupted) as raised:
        take_turns(runs, stop)
    assert newest(tmp_path / "a") == newest(tmp_path / "b") == ["step-000003"]
    assert [path.parent.parent.parent.name for path in raised.value.checkpoints] == ["a", "b"]
    assert "can be resumed from" in str(raised.value)
    assert isinstance(raised.value, KeyboardInterrupt), "whoever knows nothing of it exits as after Ctrl-C"


def test_a_run_that_is_done_needs_no_checkpoint_at_an_interrupt(tmp_path: Path) -> None:
    done = make_run(make_train_settings(tmp_path / "a", max_steps=1))
    run_to_end(done)
    other = make_run(make_train_settings(tmp_path / "b"))
    stop = StopRequest()
    stop.is_set = True
    with pytest.raises(TrainingInterrupted) as raised:
        take_turns([done, other], stop)
    assert [path.name for path in raised.value.checkpoints] == ["step-000000"]


def test_the_handlers_before_are_there_again_afterwards() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest().installed():
        assert signal.getsignal(signal.SIGINT) not in before.values()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def send(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run = make_run(make_train_settings(tmp_path), listener=send)
    with StopRequest().installed() as stop, pytest.raises(KeyboardInterrupt) as raised:
        take_turns([run], stop)
    assert not isinstance(raised.value, TrainingInterrupted)
    assert newest(tmp_path) == []


def test_an_interrupt_from_elsewhere_leaves_a_checkpoint_too(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        take_turns([make_run(make_train_settings(tmp_path), listener=interrupt)], StopRequest())
    assert newest(tmp_path) == ["step-000002"]


def test_an_evaluation_is_not_waited_for(tmp_path: Path) -> None:
    batches = 0

    def send(event: Event) -> None:
        nonlocal batches
        if isinstance(event, EvaluationProgress):
            batches += 1
            os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest().installed() as stop:
        run = make_run(
            make_train_settings(tmp_path),
            held_out=make_dataset(20, 1),
            listener=all_of(send, stop),
        )
        with pytest.raises(TrainingInterrupted):
            take_turns([run], stop)
    assert batches == 1, "the evaluation has five batches"
    assert newest(tmp_path) == ["step-000006"]


def test_one_checkpoint_that_fails_does_not_keep_the_others_from_being_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file where the directory would be")
    runs = [make_run(make_train_settings(tmp_path / task, task=task)) for task in ("a", "b")]
    stop = StopRequest()
    stop.is_set = True
    with pytest.raises(CheckpointError, match="cannot be written"):
        take_turns(runs, stop)
    assert newest(tmp_path / "b") == ["step-000000"]


def test_on_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopRequest().installed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
