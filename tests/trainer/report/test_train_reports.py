"""What a training says of its data, its date and its file is so: counted, recorded, measured on what was saved."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.batch import collate
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.task_data import read_task_data
from manyhats.trainer.errors import CheckpointError, SettingError
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.report.events import DataRead, Event, StepReport, TokenizingProgress
from manyhats.trainer.report.progress import lines_of
from manyhats.trainer.report.served import read_saved
from manyhats.trainer.run import task as task_training
from manyhats.trainer.run.checkpoint import recorded_date
from manyhats.trainer.run.evaluation import in_float32
from manyhats.trainer.run.interrupt import TrainingInterrupted
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
)
from manyhats.trainer.settings.settings import TrainSettings
from manyhats.trainer.train import train
from support.factories.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from support.factories.training_tasks import TinyTask, make_tiny_task

NAMES = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2]}
DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') + '\n' }}" + CHAT_TEMPLATE


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return make_tiny_task(tmp_path)


def dated(task: TinyTask) -> TinyTask:
    """The task on the same base with a template that writes the date."""
    tokenizer = Tokenizer(tiny_tokenizer(), special_tokens=NAMES, chat_template=DATED)
    return replace(task, model=replace(task.model, tokenizer=tokenizer))


def interrupting(step: int) -> Any:
    def listener(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listener


class LaterDay(datetime):
    """A clock that goes a day further."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(days=1)


def test_a_resume_on_a_later_day_has_the_rows_of_the_first(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dated(task)
    settings = task.settings(data={"chat": True, "labels": ()})
    with pytest.raises(TrainingInterrupted):
        train(settings, task.model, listener=interrupting(3))
    date = recorded_date(task.out)
    assert date is not None
    monkeypatch.setattr(task_training, "datetime", LaterDay)
    report = train(settings, task.model, resume=True)
    assert len(report.steps) == 12
    assert report.date == date
    assert json.loads((task.out / "training/report.json").read_bytes())["data"]["date"] == date.isoformat()


def test_a_dates_rows_are_those_of_that_date(task: TinyTask) -> None:
    task = dated(task)
    data = read_task_data(
        task.settings(data={"chat": True}).data, task.model, 0, now=datetime(2024, 2, 29, 1)
    )
    pieces = [task.model.tokenizer.piece(token_id) for token_id in data.train.prompt_token_ids(0)]
    assert "".join(pieces).startswith("2024-02-29 01:00:00.000000\n")


def test_without_a_checkpoint_no_date_is_recorded_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert recorded_date(tmp_path) is None
    directory = tmp_path / "training/checkpoints/step-000001"
    directory.mkdir(parents=True)
    (directory / "run.json").write_text('{"format": 1, "date": "yesterday"}')
    with pytest.raises(CheckpointError, match="'yesterday' is not a date"):
        recorded_date(tmp_path)


METHODS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4),
    "dora": LoraSettings(rank=4, use_dora=True),
    "bottleneck": BottleneckSettings(),
    "prefix_tuning": PrefixSettings(num_virtual_tokens=4, projection_size=8),
    "prompt_tuning": PromptSettings(num_virtual_tokens=4),
}


@torch.no_grad()
def loss_of_file(settings: TrainSettings, task: TinyTask) -> float:
    """The held-out loss with the adapter as its file has it, each row by itself."""
    saved = read_saved("t", task.out, task.model.description)
    decoder = TrainingDecoder(
        task.model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
    )
    prefix = saved.lowered.prefix
    held_out: Dataset | None = read_task_data(
        settings.data, task.model, 0 if prefix is None else prefix.num_virtual_tokens
    ).held_out
    assert held_out is not None
    lowered = in_float32(saved.lowered, torch.device("cpu"))
    total = sum(decoder.loss(collate([row]), lowered).item() for row in held_out.rows)
    return total / held_out.rows.num_targets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("save_dtype", ["bfloat16", "float32"])
def test_the_loss_after_is_that_of_the_file(method: str, save_dtype: str, task: TinyTask) -> None:
    settings = task.settings(
        METHODS[method], data={"labels": ()}, save_dtype=save_dtype, epochs=4, learning_rate=3e-2
    )
    report = train(settings, task.model)
    assert report.evaluation is not None
    after = report.evaluation.after.loss
    assert after == pytest.approx(loss_of_file(settings, task), abs=2e-5)
    if save_dtype == "bfloat16":
        assert after != report.evaluations[-1].loss, "the rounding shows"


def test_the_best_checkpoints_file_is_measured_too(task: TinyTask) -> None:
    settings = task.settings(
        data={"labels": ()}, save_dtype="bfloat16", epochs=20, learning_rate=0.2, patience=1, eval_steps=2
    )
    report = train(settings, task.model)
    assert report.artifact.step < len(report.steps)
    assert report.evaluation is not None
    assert report.evaluation.after.loss == pytest.approx(loss_of_file(settings, task), abs=2e-5)


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("overlong", ["skip", "truncate"])
def test_overlong_rows_of_both_data_sets_are_told_of_everywhere(overlong: str, task: TinyTask) -> None:
    long, short = ({"prompt": "p" * length, "completion": "abc"} for length in (90, 5))
    write_rows(task.directory / "train.jsonl", [long, short] * 5)
    write_rows(task.directory / "eval.jsonl", [short] * 7 + [long] * 3)
    told: list[DataRead] = []
    settings = task.settings(data={"labels": (), "max_length": 64, "overlong": overlong}, max_steps=1)
    report = train(
        settings,
        task.model,
        listener=lambda event: told.append(event) if isinstance(event, DataRead) else None,
    )
    what = {"skip": "left out", "truncate": "truncated"}[overlong]
    assert [line for event in told for line in lines_of(event)] == [
        f"colour: training data: 5 rows {what} as too long",
        f"colour: held-out data: 3 rows {what} as too long",
    ]
    name = {"skip": "skipped", "truncate": "truncated"}[overlong]
    data = json.loads((task.out / "training/report.json").read_bytes())["data"]
    assert (data[name], data["eval"][name]) == (5, 3)
    assert report.held_out is not None
    card = (task.out / "README.md").read_text()
    assert f"5 rows {what} as too long." in card
    assert f"Of the held-out data, 3 rows {what} as too long." in card


def test_ignored_fields_are_a_warning(task: TinyTask) -> None:
    path = task.directory / "train.jsonl"
    write_rows(path, [{**json.loads(line), "id": 1} for line in path.read_text().splitlines()])
    told: list[str] = []
    train(
        task.settings(data={"labels": (), "ignore_fields": True}, max_steps=1),
        task.model,
        listener=lambda event: told.extend(lines_of(event)) if isinstance(event, DataRead) else None,
    )
    assert told == ["warning: colour: training data: 24 rows had the field id, which nothing reads: ignored"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_reading_of_data(number: signal.Signals, task: TinyTask) -> None:
    seen = 0

    def listener(event: Event) -> None:
        nonlocal seen
        if isinstance(event, TokenizingProgress):
            seen += 1
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingInterrupted) as raised:
        train(task.settings(), task.model, listener=listener)
    assert raised.value.checkpoints == ()
    assert seen == 1
    assert not task.out.exists()


def test_a_first_text_without_embeddings_is_refused(task: TinyTask) -> None:
    backend = tiny_tokenizer()
    backend.add_tokens([f"<new{index}>" for index in range(400)])
    tokenizer = Tokenizer(backend, special_tokens=NAMES)
    model = replace(task.model, tokenizer=tokenizer)
    settings = task.settings(PromptSettings(num_virtual_tokens=4, init="text", init_text="a <new399>"))
    with pytest.raises(SettingError, match=r"init_text: has the token \d+ \('<new399>'\)"):
        train(settings, model)
