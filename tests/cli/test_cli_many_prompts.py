"""``manyhats generate --file``: many prompts, in this process, against the fake server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from support.fakes.client import FakeServer

LINES = ["one", "two", "three"]


def run(fake: FakeServer, *args: str, stdin: str = "") -> Result:
    command = ["generate", *args, "--server", fake.target]
    return CliRunner().invoke(app, command, input=stdin, prog_name="manyhats")


@pytest.fixture
def echoing(fake: FakeServer) -> FakeServer:
    fake.echoes = True
    return fake


def texts_of(stdout: str) -> list[str]:
    return [text.rpartition(" ")[0] for text in stdout.removesuffix("\n").split("\n---\n")]


def generated(fake: FakeServer) -> list[tuple[str, str]]:
    return [(each.text, each.task_id) for each in fake.requests if each.DESCRIPTOR.name == "GenerateRequest"]


def test_each_line_of_a_file_is_a_prompt(echoing: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\r\nthree")
    result = run(echoing, "--file", str(file), "--task", "sql", "--concurrency", "2")
    assert (result.exit_code, result.stderr) == (0, "prompts ...\n")
    assert texts_of(result.stdout) == LINES
    assert sorted(generated(echoing)) == sorted((line, "sql") for line in LINES)
    assert echoing.most_running <= 2


def test_stdin_and_json(echoing: FakeServer) -> None:
    result = run(echoing, "--file", "-", "--json", "--chat", stdin="\n".join(LINES))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["finish_reason"] for answer in answers] == ["eos"] * 3
    chats = [each.chat.messages for each in echoing.requests if each.DESCRIPTOR.name == "GenerateRequest"]
    assert sorted(chat[0].content for chat in chats) == sorted(LINES)


def test_a_jsonl_file_has_prompts_or_conversations_and_tasks(echoing: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "one", "id": 7},
        {"prompt": "two\nlines", "task": "tldr"},
        {"messages": [{"role": "user", "content": "three"}], "task": ""},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert run(echoing, "--file", str(file), "--task", "sql").exit_code == 0
    assert sorted(generated(echoing)) == [("", ""), ("one", "sql"), ("two\nlines", "tldr")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 is not JSON"),
        ('"text"', "line 2 must be an object with a text `prompt` or a list `messages`"),
        ('{"text": "a"}', "line 2 must be an object"),
        ('{"prompt": "a", "messages": []}', "line 2 must be an object"),
        ('{"prompt": ["a"]}', "line 2 must be an object"),
        ('{"prompt": "a", "task": 3}', "line 2: `task` must be a text"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_line(
    fake: FakeServer, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    result = run(fake, "--file", str(file))
    assert result.exit_code == 2
    assert message in result.stderr
    assert fake.requests == []


def test_a_prompt_that_fails_does_not_stop_the_others(echoing: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"messages": [{"role": "user"}]}\n{"prompt": "two"}\n')
    result = run(echoing, "--file", str(file), "--json")
    assert result.exit_code == 1
    assert "error: line 3: chat.messages[0].content: must be given" in result.stderr
    assert result.stderr.endswith("error: 1 of 3 prompts failed\n")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sorted({"text", "error"} & answer.keys()) for answer in answers] == [
        ["text"],
        ["error"],
        ["text"],
    ]
    result = run(echoing, "--file", str(file))
    assert texts_of(result.stdout) == ["one", "", "two"]


def test_a_server_that_is_not_there_is_told_at_once(fake: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one")
    fake.target = "127.0.0.1:1"
    result = run(fake, "--file", str(file))
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either PROMPT or --file"),
        (["hi", "--file", "-"], "give either PROMPT or --file"),
        (["hi", "--concurrency", "2"], "--concurrency is for --file"),
        (["--file", "-", "--stream"], "--stream is for one prompt, not for --file"),
        (
            ["--file", "-", "--num-sequences", "2"],
            "--file shows one answer; with --num-sequences it needs --json",
        ),
        (["--file", "-"], "--file: - has no prompt"),
        (["--file", "/nowhere"], "--file: cannot read '/nowhere'"),
    ],
)
def test_what_does_not_go_together(fake: FakeServer, args: list[str], message: str) -> None:
    result = run(fake, *args)
    assert result.exit_code == 2
    assert message in result.stderr
