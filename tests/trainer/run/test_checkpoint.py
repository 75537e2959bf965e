from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.trainer.data.batch import TokenizedRow
from manyhats.trainer.errors import CheckpointError
from manyhats.trainer.report.events import CheckpointFailed, EvaluationReport, Event
from manyhats.trainer.report.fingerprint import rows_digest
from manyhats.trainer.run.state import RunResult
from manyhats.trainer.run.training_run import TrainingRun
from manyhats.trainer.settings.methods import LoraSettings
from manyhats.trainer.settings.settings import TrainSettings
from support.fakes.training import (
    FakeAdapter,
    ScriptedDecoder,
    make_dataset,
    make_run,
    make_train_settings,
    run_to_end,
    with_data,
)
from support.harnesses.failing_calls import FailingCalls, failing


def checkpoints(out: Path) -> list[str]:
    directory = out / "training/checkpoints"
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def without_times(result: RunResult) -> RunResult:
    return replace(
        result,
        steps=tuple(replace(step, seconds=0) for step in result.steps),
        evaluations=tuple(replace(evaluation, seconds=0) for evaluation in result.evaluations),
    )


# Resuming


def full_settings(out: Path) -> TrainSettings:
    return make_train_settings(
        out, gradient_accumulation=2, epochs=3, eval_steps=2, patience=3, weight_decay=0.01, schedule="cosine"
    )


def make_full_run(out: Path, adapter: FakeAdapter) -> TrainingRun:
    return make_run(full_settings(out), adapter=adapter, train=make_dataset(22), held_out=make_dataset(6, 3))


@pytest.mark.parametrize("step", range(10))
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_interrupted(step: int, tmp_path: Path) -> None:
    whole_adapter = FakeAdapter(dropout=0.3)
    whole = make_full_run(tmp_path / "whole", whole_adapter)
    run_to_end(whole)
    assert whole.num_steps_taken >= 9

    interrupted = make_full_run(tmp_path / "parts", FakeAdapter(dropout=0.3))
    for _ in range(min(step, whole.num_steps)):
        interrupted.step()
    interrupted.save_checkpoint()

    torch.manual_seed(99)  # another process has other random numbers
    adapter = FakeAdapter(dropout=0.3, seed=8)
    resumed = make_full_run(tmp_path / "parts", adapter)
    resumed.restore_checkpoint()
    assert resumed.num_steps_taken == step
    run_to_end(resumed)

    assert without_times(resumed.finish()) == without_times(whole.finish())
    for name, parameter in adapter.parameters.items():
        assert torch.equal(parameter, whole_adapter.parameters[name]), name


def test_an_early_stop_counts_the_evaluations_before_the_interrupt(tmp_path: Path) -> None:
    def make(losses: list[float], adapter: FakeAdapter) -> TrainingRun:
        settings = make_train_settings(tmp_path, eval_steps=1, patience=3, epochs=9)
        return make_run(
            settings, decoder=ScriptedDecoder(losses), adapter=adapter, held_out=make_dataset(4, 1)
        )

    first_adapter = FakeAdapter()
    first = make([2.0, 1.0, 1.1, 1.2], first_adapter)
    first.step()
    first.step()
    best = first_adapter.parameters["b"].detach().clone()
    first.step()
    first.step()
    first.save_checkpoint()

    adapter = FakeAdapter(seed=4)
    second = make([1.3, 0.0], adapter)
    second.restore_checkpoint()
    second.step()
    assert second.is_done
    assert second.finish().artifact_step == 2
    assert torch.equal(adapter.parameters["b"], best)


def test_a_run_that_is_done_stays_done(tmp_path: Path) -> None:
    first_adapter = FakeAdapter()
    first = make_run(make_train_settings(tmp_path), adapter=first_adapter)
    run_to_end(first)
    adapter = FakeAdapter(seed=3)
    second = make_run(make_train_settings(tmp_path), adapter=adapter)
    second.restore_checkpoint()
    assert second.is_done
    assert second.finish().steps == first.finish().steps
    assert torch.equal(adapter.parameters["a"], first_adapter.parameters["a"])


def test_an_evaluation_that_the_interrupt_cut_off_is_made_up_for(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if type(event).__name__ == "EvaluationProgress":
            raise KeyboardInterrupt

    settings = make_train_settings(tmp_path, epochs=1)
    run = make_run(settings, held_out=make_dataset(4, 1), listener=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(run)
    assert not run.is_done, "its last step is not evaluated yet"
    run.save_checkpoint()

    events: list[Event] = []
    resumed = make_run(settings, held_out=make_dataset(4, 1), listener=events.append)
    resumed.restore_checkpoint()
    assert resumed.is_done
    assert [event.step for event in events if isinstance(event, EvaluationReport)] == [6]
    make_run(settings, held_out=make_dataset(4, 1)).clear_checkpoints()  # it knows that it came to its end
    assert checkpoints(tmp_path) == []


def test_a_run_that_was_interrupted_while_its_parameters_moved_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(make_train_settings(tmp_path))
    run.step()

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    with pytest.raises(CheckpointError, match="during an update of its parameters"):
        run.save_checkpoint()


# Another training


def interrupted_run(out: Path) -> None:
    run = make_run(make_train_settings(out), held_out=make_dataset(4, 1), base={"base": "sha256:0"})
    run.step()
    run.save_checkpoint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run: run | {"settings": lambda out: make_train_settings(out, learning_rate=0.03)},
            r"optimization\.learning_rate: was 0\.02, is 0\.03",
        ),
        (
            lambda run: run | {"settings": lambda out: make_train_settings(out, seed=1, batch_size=5)},
            r"optimization\.batch_size: was 4, is 5; optimization\.seed: was 0, is 1",
        ),
        (
            lambda run: (
                run
                | {"settings": lambda out: replace(make_train_settings(out), adapter=LoraSettings(rank=3))}
            ),
            r"adapter\.rank: was 16, is 3",
        ),
        (
            lambda run: run | {"settings": lambda out: make_train_settings(out, task="other")},
            r"task: was 'fake', is 'other'",
        ),
        (
            lambda run: run | {"settings": lambda out: with_data(make_train_settings(out), shuffle=False)},
            r"data\.shuffle: was True, is False",
        ),
        (lambda run: run | {"train": make_dataset(24, 5)}, "training rows: not the same"),
        (lambda run: run | {"train": make_dataset(23)}, "training rows: not the same"),
        (lambda run: run | {"held_out": make_dataset(5, 1)}, "evaluation rows: not the same"),
        (lambda run: run | {"base": {"base": "sha256:1"}}, "base: not the same"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_by_name(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    interrupted_run(tmp_path)
    arguments = change(
        {"settings": make_train_settings, "held_out": make_dataset(4, 1), "base": {"base": "sha256:0"}}
    )
    arguments["settings"] = arguments["settings"](tmp_path)
    run = make_run(**arguments)
    with pytest.raises(CheckpointError, match=f"is of another training run: {message}$"):
        run.restore_checkpoint()


def test_settings_without_influence_on_the_losses_may_change(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    settings = make_train_settings(tmp_path, checkpoint_steps=3, keep_checkpoints=9)
    settings = replace(
        with_data(settings, train="moved.jsonl"),
        save_dtype="bfloat16",
        model=replace(settings.model, gradient_checkpointing=False, num_threads=3),
    )
    run = make_run(settings, held_out=make_dataset(4, 1), base={"base": "sha256:0"})
    run.restore_checkpoint()
    assert run.num_steps_taken == 1


def test_without_a_checkpoint_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        make_run(make_train_settings(tmp_path)).restore_checkpoint()
    with pytest.raises(CheckpointError, match="no output directory"):
        make_run().restore_checkpoint()
    with pytest.raises(CheckpointError, match="no output directory"):
        make_run().save_checkpoint()


def test_a_training_that_was_not_finished_is_not_begun_anew(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    with pytest.raises(CheckpointError, match="step-000001 is of an unfinished training run"):
        make_run(make_train_settings(tmp_path)).clear_checkpoints()
    assert checkpoints(tmp_path) == ["step-000001"]


def test_a_training_that_was_finished_makes_room(tmp_path: Path) -> None:
    run_to_end(make_run(make_train_settings(tmp_path, checkpoint_steps=5)))
    assert checkpoints(tmp_path) == ["step-000010", "step-000012"]
    make_run(make_train_settings(tmp_path)).clear_checkpoints()
    assert checkpoints(tmp_path) == []


# Damage


@pytest.mark.parametrize("file", ["parameters.safetensors", "optimizer.safetensors", "best.safetensors"])
def test_a_damaged_file_is_named(file: str, tmp_path: Path) -> None:
    run = make_full_run(tmp_path, FakeAdapter())
    for _ in range(3):
        run.step()
    path = run.save_checkpoint() / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"step-000003/{file}: damaged"):
        make_full_run(tmp_path, FakeAdapter()).restore_checkpoint()
    path.unlink()
    with pytest.raises(CheckpointError, match=f"step-000003: damaged.*{file}"):
        make_full_run(tmp_path, FakeAdapter()).restore_checkpoint()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "run.json: "), (b"[]", "not a checkpoint"), (b'{"format": 99}', "not a checkpoint")],
)
def test_a_damaged_state_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    (tmp_path / "training/checkpoints/step-000001/run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        make_run(make_train_settings(tmp_path)).restore_checkpoint()


def test_checkpoints_hold_no_code(tmp_path: Path) -> None:
    interrupted_run(tmp_path)
    directory = tmp_path / "training/checkpoints/step-000001"
    assert sorted(path.name for path in directory.iterdir()) == [
        "optimizer.safetensors",
        "parameters.safetensors",
        "run.json",
    ]
    assert json.loads((directory / "run.json").read_bytes())["step"] == 1


# Which are kept


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, ["step-000004", "step-000012"]),
        (2, ["step-000004", "step-000010", "step-000012"]),
        (0, ["step-000004", "step-000012"]),
        (9, [f"step-{step:06d}" for step in (2, 4, 6, 8, 10, 12)]),
    ],
)
def test_the_newest_and_the_best_are_kept(keep: int, expected: list[str], tmp_path: Path) -> None:
    settings = make_train_settings(tmp_path, checkpoint_steps=2, keep_checkpoints=keep, eval_steps=2)
    decoder = ScriptedDecoder([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    run_to_end(make_run(settings, decoder=decoder, held_out=make_dataset(4, 1)))
    assert checkpoints(tmp_path) == expected


def test_the_best_is_kept_even_between_two_checkpoints(tmp_path: Path) -> None:
    settings = make_train_settings(tmp_path, checkpoint_steps=5, keep_checkpoints=1, eval_steps=3)
    decoder = ScriptedDecoder([1.0, 2.0, 2.0, 2.0])
    run_to_end(make_run(settings, decoder=decoder, held_out=make_dataset(4, 1)))
    assert checkpoints(tmp_path) == ["step-000003", "step-000012"]


def test_without_a_number_of_steps_only_the_end_is_kept(tmp_path: Path) -> None:
    run = make_run(make_train_settings(tmp_path))
    for _ in range(11):
        run.step()
    assert checkpoints(tmp_path) == []
    run.step()
    assert checkpoints(tmp_path) == ["step-000012"]


# A disk that fails


def calls_of_a_checkpoint(tmp_path: Path) -> int:
    run = make_run(make_train_settings(tmp_path / "counted", keep_checkpoints=1))
    run.step()
    run.save_checkpoint()
    run.step()
    with failing(FailingCalls(fail_at=0)) as calls:
        run.save_checkpoint()
    assert {"open", "write", "fsync", "rename", "mkdir"} <= set(calls.made)
    return len(calls.made)


def fails_for_want_of_space(run: TrainingRun) -> bool:
    try:
        run.save_checkpoint()
    except CheckpointError as error:
        return "cannot be written: No space left on device" in str(error)
    return False


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
def test_whichever_call_fails_a_whole_checkpoint_is_there(stays: bool, tmp_path: Path) -> None:
    num_calls = calls_of_a_checkpoint(tmp_path)
    num_failed = 0
    for fail_at in range(1, num_calls + 1):
        out = tmp_path / f"{fail_at}"
        run = make_run(make_train_settings(out, keep_checkpoints=1))
        run.step()
        run.save_checkpoint()
        run.step()
        with failing(FailingCalls(fail_at, stays=stays, code=errno.ENOSPC)) as calls:
            num_failed += fails_for_want_of_space(run)
        assert calls.failed, "the call was not reached"
        resumed = make_run(make_train_settings(out, keep_checkpoints=1))
        resumed.restore_checkpoint()
        assert resumed.num_steps_taken in (1, 2)
        # The run goes on, writes again, and clears away what was left.
        run.save_checkpoint()
        assert checkpoints(out) == ["step-000002"]
    assert num_failed > 10


@pytest.mark.parametrize("fail_at", range(1, 40))
def test_a_checkpoint_that_is_written_again_is_never_lost(fail_at: int, tmp_path: Path) -> None:
    run = make_run(make_train_settings(tmp_path))
    run.step()
    run.save_checkpoint()
    with failing(FailingCalls(fail_at, code=errno.EIO)), suppress(CheckpointError):
        run.save_checkpoint()
    resumed = make_run(make_train_settings(tmp_path))
    resumed.restore_checkpoint()
    assert resumed.num_steps_taken == 1


def test_training_goes_on_where_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    events: list[Event] = []
    run = make_run(make_train_settings(tmp_path, checkpoint_steps=2), listener=events.append)
    for _ in range(3):
        run.step()
    with failing(FailingCalls(1, stays=True, code=errno.ENOSPC)):
        run.step()
    run_to_end(run)
    failed = [event for event in events if isinstance(event, CheckpointFailed)]
    assert [event.step for event in failed] == [4]
    assert run.finish().failures == (str(failed[0].error),)
    assert "step-000004: cannot be written: No space left on device" in str(failed[0].error)
    assert checkpoints(tmp_path) == ["step-000010", "step-000012"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    run = make_run(make_train_settings(tmp_path))
    left = tmp_path / "training/checkpoints/.step-000001.0123.partial"
    left.mkdir(parents=True)
    (left / "run.json").write_bytes(b"{")
    run.step()
    run.save_checkpoint()
    assert checkpoints(tmp_path) == ["step-000001"]


# What tells one training from another


def test_rows_differ_by_tokens_targets_and_where_they_are_cut() -> None:
    def row(tokens: tuple[int, ...], first_target: int = 1) -> TokenizedRow:
        return TokenizedRow(tokens, tuple(place >= first_target for place in range(len(tokens))))

    data = [
        [row((1, 2, 3))],
        [row((1, 2, 4))],
        [row((1, 2, 3), first_target=2)],
        [row((1, 2)), row((3, 4))],
        [row((1, 2, 3)), row((4,))],
        [row((3, 4)), row((1, 2))],
        [],
    ]
    assert len({rows_digest(rows) for rows in data}) == len(data)
    assert rows_digest(data[0]) == rows_digest([row((1, 2, 3))])
