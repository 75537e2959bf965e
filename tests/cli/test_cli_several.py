"""Several adapters in one ``adapters upload`` or ``register``, on a store, over a real port."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

from manyhats.adapters.store.opening import open_store
from manyhats.cli.adapters.batch import Item, parse_items
from manyhats.cli.main import app
from manyhats.cli.terminal.failures import UsageError
from support.factories.adapters import make_base, make_lora
from support.fakes.client import FakeServer
from support.fakes.server import running_server

BASE = make_base(names=("org/tiny",))


def serve_and_run(root: Path, *commands: list[str]) -> list[Result]:
    """The results of commands, each on the same server, which may register from ``root``."""

    async def scenario() -> list[Result]:
        store = open_store(root / "store", BASE, [root])
        # The server's log would come among what the commands print.
        with structlog.testing.capture_logs():
            async with running_server(store=store) as server:
                return [
                    await asyncio.to_thread(
                        CliRunner().invoke,
                        app,
                        ["adapters", *command, "--server", server.port.address],
                        prog_name="manyhats",
                    )
                    for command in commands
                ]

    return asyncio.run(scenario())


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Three adapters, one of them for another base, and what is none."""
    for seed, name in enumerate(("fr", "polite")):
        make_lora(tmp_path / "tasks" / name, BASE, seed=seed)
    make_lora(tmp_path / "tasks" / "other", BASE, seed=9, base_model_name_or_path="other/large")
    (tmp_path / "tasks" / "notes").mkdir()
    (tmp_path / "tasks" / "README.md").write_text("no adapter")
    return tmp_path / "tasks"


@pytest.mark.parametrize("command", ["upload", "register"])
def test_each_adapter_of_a_directory_becomes_a_task_and_what_fails_is_told(tasks: Path, command: str) -> None:
    made, listed, again = serve_and_run(
        tasks.parent, [command, str(tasks)], ["list", "--json"], [command, str(tasks), "--assume-base"]
    )
    assert made.exit_code == 1
    done = "uploaded" if command == "upload" else "registered"
    assert re.findall(rf"^{done}: (\S+) \(lora, active", made.stdout, re.MULTILINE) == ["fr@1", "polite@1"]
    *_, failure, last = made.stderr.splitlines()
    assert failure.startswith("failed: other: base_model_name_or_path: was made for 'other/large'")
    assert last == "error: 1 of 3 adapters failed: other"
    assert [info["task_id"] for info in json.loads(listed.stdout)] == ["fr", "polite"]
    assert again.exit_code == 0
    assert [line.split(" (")[0] for line in again.stdout.splitlines()] == [
        f"already {done}: fr@1",
        f"{done}: other@1",
        f"already {done}: polite@1",
    ]


@pytest.mark.parametrize("command", ["upload", "register"])
def test_pairs_name_the_tasks(tasks: Path, command: str) -> None:
    pairs = [f"a={tasks / 'fr'}", f"b={tasks / 'polite'}", f"c={tasks / 'notes'}"]
    made, one = serve_and_run(tasks.parent, [command, *pairs, "--json"], [command, pairs[0]])
    assert made.exit_code == 1
    outcomes = json.loads(made.stdout)
    assert [outcome["task_id"] for outcome in outcomes] == ["a", "b", "c"]
    assert [outcome["registration"]["adapter"]["version"] for outcome in outcomes[:2]] == [1, 1]
    assert "adapter_config.json" in outcomes[2]["error"]
    assert (one.exit_code, one.stdout.startswith("already")) == (0, True)


@pytest.mark.parametrize("command", ["upload", "register"])
def test_a_subdirectory_that_is_no_adapter_is_skipped_with_a_word_and_weights_alone_fail(
    tasks: Path, command: str
) -> None:
    (tasks / "other" / "adapter_config.json").unlink()
    (made,) = serve_and_run(tasks.parent, [command, str(tasks)])
    assert made.exit_code == 1
    assert f"skipped: {tasks}/notes: has no adapter_config.json\n" in made.stderr
    assert f"failed: other: {tasks}/other has weights but no adapter_config.json\n" in made.stderr
    assert made.stderr.endswith("error: 1 of 3 adapters failed: other\n")
    assert "README" not in made.stderr


def test_a_weight_of_a_part_that_is_no_number_is_named(tasks: Path) -> None:
    part = f"{tasks / 'fr'}=abc"
    result = CliRunner().invoke(app, ["adapters", "register", "x", "--part", part], prog_name="manyhats")
    assert (result.exit_code, result.stderr) == (2, f"error: --part: 'abc' is not a weight, in {part!r}\n")


def test_a_name_that_is_no_task_id_fails_alone(tasks: Path) -> None:
    (tasks / "polite").rename(tasks / "Polite Ones")
    (made,) = serve_and_run(tasks.parent, ["upload", str(tasks), "--assume-base"])
    assert made.exit_code == 1
    assert "error: 1 of 3 adapters failed: Polite Ones" in made.stderr
    assert made.stdout.count("uploaded: ") == 2


def test_a_server_that_is_not_there_is_tried_once(tasks: Path) -> None:
    arguments = ["adapters", "upload", str(tasks), "--server", "127.0.0.1:1", "--timeout", "5"]
    result = CliRunner().invoke(app, arguments, prog_name="manyhats")
    assert result.exit_code == 1
    assert result.stderr.count("was not tried") == 2
    assert "error: 3 of 3 adapters failed: fr, other, polite" in result.stderr


@pytest.mark.parametrize("command", ["upload", "register"])
@pytest.mark.parametrize("option", ["--request-id=r", "--expected-digest=sha256:ab"])
def test_what_is_for_one_adapter_is_refused_with_several(tasks: Path, command: str, option: str) -> None:
    result = CliRunner().invoke(app, ["adapters", command, str(tasks), option], prog_name="manyhats")
    assert result.exit_code == 2
    assert f"{option.split('=')[0]} is for one adapter, not for 3" in result.stderr


def test_arguments_are_a_task_and_a_path_or_pairs_or_directories(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks.parent)
    in_folder = [Item(name, f"tasks/{name}") for name in ("fr", "other", "polite")]
    cases: list[tuple[list[str], list[Item]]] = [
        (["sql", "./sql"], [Item("sql", "./sql")]),
        (["sql", "/a=b"], [Item("sql", "/a=b")]),
        (["sql", "c=d"], [Item("sql", "c=d")]),
        (["tasks", "tasks/fr"], [Item("tasks", "tasks/fr")]),
        (["sql", "s3://b/sql"], [Item("sql", "s3://b/sql")]),
        (["sql=s3://b/sql?x=y"], [Item("sql", "s3://b/sql?x=y")]),
        (["a=./a", "b=./b"], [Item("a", "./a"), Item("b", "./b")]),
        (["a=x", "b=y", "c=z"], [Item("a", "x"), Item("b", "y"), Item("c", "z")]),
        (["tasks"], in_folder),
        (["./tasks"], in_folder),
        (["tasks/"], in_folder),
        (["./tasks", "a=x"], [*in_folder, Item("a", "x")]),
        (["a=x", "tasks"], [Item("a", "x"), *in_folder]),
    ]
    for texts, expected in cases:
        assert parse_items(texts) == expected, texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nothing"], "'nothing' is not a directory"),
        (["a", "b", "c"], "'a' is not a directory"),
        (["tasks/fr"], "is an adapter itself; give its task"),
        (["tasks/notes"], "has no subdirectory with an adapter_config.json"),
        (["tasks/README.md"], "is not a directory"),
        (["a=x", "a=y"], "a is given twice"),
        (["./tasks", "fr=x"], "fr is given twice"),
        (["./tasks", "./tasks"], "fr is given twice"),
        (["=x"], "is not a directory"),
        (["a="], "is not a directory"),
        (["a=x", "b"], "'b' is not a directory"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], message: str
) -> None:
    monkeypatch.chdir(tasks.parent)
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_items(texts)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_listing_a_task_that_is_not_there_is_an_error(fake: FakeServer, options: list[str]) -> None:
    for task in ("sqq", "sq", "SQL", "sql@9"):
        arguments = ["adapters", "list", task, "--server", fake.target, *options]
        result = CliRunner().invoke(app, arguments, prog_name="manyhats")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"error: no task '{task}'; `manyhats adapters list` shows what there is\n"
