"""A file of several tasks: what is shared, what is a task's own, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyhats.adapters.artifact import AdapterMethod
from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.settings import TrainSettings
from manyhats.trainer.settings.settings_file import read_tasks


def tasks_of(
    directory: Path, tasks: Any, flags: Mapping[str, Any] | None = None, **shared: Any
) -> Sequence[TrainSettings]:
    file = directory / "tasks.yaml"
    file.write_text(yaml.safe_dump({**shared, "tasks": tasks}))
    return read_tasks(file, flags or {})


SQL = {"task": "sql", "method": "lora", "data": "sql.jsonl"}
CHAT = {"task": "chat", "method": "prefix", "data": "chat.jsonl"}


def test_each_task_has_its_own_settings_and_the_shared_ones(tmp_path: Path) -> None:
    sql, chat = tasks_of(
        tmp_path, [{**SQL, "seed": 7, "batch-size": 2}, CHAT], model="tiny", **{"batch-size": 8, "epochs": 2}
    )
    assert (sql.task, chat.task) == ("sql", "chat")
    assert (sql.adapter.method, chat.adapter.method) == (AdapterMethod.LORA, AdapterMethod.PREFIX_TUNING)
    assert (sql.data.train, chat.data.train) == ("sql.jsonl", "chat.jsonl")
    assert [each.optimization.batch_size for each in (sql, chat)] == [2, 8]
    assert [each.optimization.seed for each in (sql, chat)] == [7, 0]
    assert {each.optimization.epochs for each in (sql, chat)} == {2.0}
    assert sql.model == chat.model
    assert sql.model.model == "tiny"


def test_flags_win_over_shared_and_own_settings(tmp_path: Path) -> None:
    flags = {"batch_size": 1, "out": "elsewhere"}
    tasks = tasks_of(tmp_path, [{**SQL, "batch_size": 2}, CHAT], flags, batch_size=8)
    assert [each.optimization.batch_size for each in tasks] == [1, 1]
    assert [each.out for each in tasks] == ["elsewhere/sql", "elsewhere/chat"]


def test_output_directories(tmp_path: Path) -> None:
    assert [each.out for each in tasks_of(tmp_path, [SQL, {**CHAT, "out": "c"}])] == ["tasks/sql", "c"]
    assert [each.out for each in tasks_of(tmp_path, [SQL, CHAT], out="o")] == ["o/sql", "o/chat"]


def test_a_shared_setting_of_some_methods_is_for_their_tasks(tmp_path: Path) -> None:
    sql, chat = tasks_of(tmp_path, [SQL, CHAT], {"num_virtual_tokens": 3}, rank=4)
    assert sql.adapter.rank == 4  # type: ignore[union-attr]
    assert chat.adapter.num_virtual_tokens == 3  # type: ignore[union-attr]


def test_all_are_on_one_base(tmp_path: Path) -> None:
    assert {each.model.quantization for each in tasks_of(tmp_path, [SQL, CHAT])} == {"auto"}
    quantized = tasks_of(tmp_path, [SQL, CHAT, {**SQL, "task": "q", "method": "qlora"}])
    assert {each.model.quantization for each in quantized} == {"nf4"}
    dense = tasks_of(tmp_path, [SQL, CHAT], quantization="none")
    assert {each.model.quantization for each in dense} == {"none"}
    with pytest.raises(SettingError, match=r"^tasks\[q\]\.quantization: qlora needs nf4"):
        tasks_of(tmp_path, [SQL, {**SQL, "task": "q", "method": "qlora"}], quantization="none")


def test_one_data_file_and_method_for_all(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, [{"task": "a"}, {"task": "b", "seed": 1}], method="lora", data="d.jsonl")
    assert [each.data.train for each in tasks] == ["d.jsonl", "d.jsonl"]


@pytest.mark.parametrize(
    ("tasks", "shared", "message"),
    [
        (None, {}, r"tasks: .* must have a list 'tasks'"),
        ([], {}, r"tasks: .* must have a list 'tasks'"),
        (["sql"], {}, r"tasks\[0\]: must be a mapping"),
        ([SQL, {**CHAT, "rank": 4}], {}, r"tasks\[chat\]\.rank: is not a setting of prefix"),
        ([SQL, {**CHAT, "colour": 4}], {}, r"tasks: .*tasks\.yaml: tasks\[chat\]\.colour: is not a setting"),
        (
            [SQL, {**CHAT, "max-step": 4}],
            {},
            r"tasks: .*\.yaml: tasks\[chat\]\.max_step: .*; did you mean max_steps\?",
        ),
        ([{**SQL, "rank": 0}], {}, r"tasks\[sql\]\.rank: must be at least 1"),
        ([{**SQL, "model": "tiny"}], {}, r"tasks\[sql\]\.model: is shared by all tasks"),
        ([{"method": "lora", "data": "d"}], {}, r"tasks\[0\]\.task: must be given"),
        ([{"task": "sql", "data": "d"}], {}, r"tasks\[sql\]\.method: must be given"),
        ([SQL], {"colour": "red"}, r"tasks: .*tasks\.yaml: colour: is not a setting"),
        (
            [SQL],
            {"num_virtual_tokens": 3},
            r"tasks: .*tasks\.yaml: num_virtual_tokens: is not a setting of any task's method",
        ),
        ([SQL], {"task": "sql"}, r"tasks: .*tasks\.yaml: task: must be set for each task"),
        (
            [{**SQL, "target-module": "a", "target_modules": "b"}],
            {},
            r"tasks: .*: target_modules: is given twice",
        ),
        ([SQL, {**CHAT, "task": "sql"}], {}, r"tasks\[sql\]\.task: appears twice"),
        ([{**SQL, "out": "o"}, {**CHAT, "out": "./o"}], {}, r"tasks\[chat\]\.out: is also used by sql"),
    ],
)
def test_wrong_file_names_task_and_setting(
    tmp_path: Path, tasks: Any, shared: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        tasks_of(tmp_path, tasks, **shared)


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    for flags, message in (
        ({"task": "sql"}, "task: must be set for each task"),
        ({"colour": "red"}, "colour: is not a setting"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens: is not a setting of any"),
    ):
        with pytest.raises(SettingError, match=f"^{message}"):
            tasks_of(tmp_path, [SQL], flags)


def test_a_key_that_comes_twice_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks:\n  - task: sql\n    data: a\n    data: b\n")
    with pytest.raises(SettingError, match=r"^tasks: .*tasks\.yaml:4: data: is given twice"):
        read_tasks(file, {})
