"""Training that goes on from an artifact with text files of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.disk.files import open_local
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.trainer.data.task_data import read_task_data, with_text_of
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.methods import LoraSettings
from manyhats.trainer.settings.settings import TrainSettings
from manyhats.trainer.train import train
from support.factories.tiny_models import save_tokenizer, tiny_tokenizer
from support.factories.training_tasks import TinyTask, in_directory, make_tiny_task

OWN = (
    "{% for m in messages %}<tool>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<tool>assistant: {% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    """A task that was trained once, whose artifact then got a tokenizer and a template."""
    task = make_tiny_task(tmp_path_factory.mktemp("first"))
    train(short(task), task.model)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    save_tokenizer(task.out, tokenizer, eos_token="<|endoftext|>", chat_template=OWN)
    return task


def short(task: TinyTask, **data: Any) -> TrainSettings:
    return task.settings(LoraSettings(rank=4), data={"eval": "", "labels": (), **data}, max_steps=1)


def test_rows_are_rendered_and_tokenized_as_the_artifacts_task_has_them(
    first: TinyTask, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(CHAT))
    model, files = with_text_of(first.model, str(first.out))
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    assert model.generation.eos_token_ids == first.model.generation.eos_token_ids | {0}
    settings = short(first, train=str(tmp_path / "train.jsonl")).data
    (row,) = read_task_data(settings, model, 0).train.rows
    transformers: Any = import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(first.out)
    expected = theirs.apply_chat_template(CHAT["messages"], return_dict=False)
    assert list(row.token_ids)[: len(expected)] == expected
    (of_base,) = read_task_data(settings, first.model, 0).train.rows
    assert of_base.token_ids != row.token_ids


def test_what_is_trained_keeps_the_text_files_and_reports_them(first: TinyTask, tmp_path: Path) -> None:
    task = in_directory(first, tmp_path / "second")
    settings = replace(task.settings(LoraSettings(rank=4), max_steps=1), init_from=str(first.out))
    report = train(settings, task.model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (task.out / name).read_bytes() == (first.out / name).read_bytes()
        assert name in report.artifact.files
    with open_local(task.out) as directory:
        read = read_adapter(directory, task.model.description, AdapterLimits())
    assert read.artifact.digest == report.artifact.digest
    assert read.text.fingerprint == with_text_of(task.model, str(first.out))[0].tokenizer.fingerprint
    assert report.evaluation is not None
    # Trained again without it, nothing of it stays.
    train(short(task), task.model)
    assert not (task.out / "tokenizer.json").exists()


def test_an_artifact_without_text_files_trains_on_the_bases(first: TinyTask, tmp_path: Path) -> None:
    task = in_directory(first, tmp_path / "plain")
    train(short(task), task.model)
    assert with_text_of(task.model, "") == (task.model, {})
    model, files = with_text_of(task.model, str(task.out))
    assert (model.tokenizer, files) == (task.model.tokenizer, {})


def test_text_files_that_do_not_fit_the_base_are_named(first: TinyTask, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(SettingError, match=r"chat_template\.jinja: .*line 1"):
        with_text_of(first.model, str(tmp_path))
