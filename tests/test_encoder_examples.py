"""The encoder's example tasks as they are committed: served as ``make run-encoder`` does, and right."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from examples.encoder.calls import ADAPTERS, read_calls
from examples.encoder.concierge import notes, questions
from examples.encoder.contact import CLASSES, tagged
from examples.encoder.mixed_call import ask_all
from examples.encoder.results import read_results, table
from examples.encoder.tasks import ENCODER_TASKS, EncoderTask
from examples.encoder.train import write_data
from examples.serve import ready_addresses
from examples.tasks.task import Item, Split

from manyhats.adapters.heads import TaskKind
from manyhats.client import Client

ROOT = Path(__file__).parent.parent
KINDS = {"classify": TaskKind.CLASSIFY, "tag": TaskKind.CLASSIFY_TOKENS, "embed": TaskKind.EMBED}
MAX_BYTES = 1_000_000
NUM_SERVED = 24
# Of the held-out rows served here; each got at least four fifths where this was written, the notes two thirds.
LEAST_RIGHT = {"concierge": 0.5}
OTHERS_LEAST_RIGHT = 0.7


@dataclass(frozen=True)
class Running:
    """A server of the examples, and what it printed."""

    grpc: str
    printed: list[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("encoder") / "store"
    arguments = ["--store", str(store), "--grpc-port", "0", "--http-port", "0", "--num-threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.encoder.serve", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    printed: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line.rstrip())
            if "Ctrl-C" in line:
                break
        addresses = [found for line in printed if (found := ready_addresses(line))]
        assert addresses, printed
        yield Running(addresses[0][0], printed)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


# The data


@pytest.mark.parametrize("task", ENCODER_TASKS.values(), ids=list(ENCODER_TASKS))
def test_data_is_the_same_every_time_and_held_out_rows_are_not_trained_on(
    task: EncoderTask, tmp_path: Path
) -> None:
    train, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_data(task, tmp_path)
    )
    assert train == list(task.rows(Split.TRAIN))
    assert len(held_out) == 60
    key = "query" if task.command == "embed" else "tokens" if task.command == "tag" else "text"
    assert not {str(row[key]) for row in held_out} & {str(row[key]) for row in train}
    assert task.demo not in {row.get("text") for row in (*train, *held_out)}


def test_every_note_answers_as_many_questions_as_every_other() -> None:
    for split in Split:
        asked = [note for _, note in questions(split)]
        assert {asked.count(note) for note in notes()} == {len(asked) // len(notes())}


def test_words_of_a_contact_are_tagged_from_their_first_to_their_last() -> None:
    message = "Ask Ann Lee (ann@a.example) or (212) 555-0101."
    answer = {"name": "Ann Lee", "email": "ann@a.example", "phone": "(212) 555-0101"}
    row = tagged(Item(message, json.dumps(answer)))
    assert dict(zip(row["tokens"][1:3], row["tags"][1:3], strict=True)) == {"Ann": "B-NAME", "Lee": "I-NAME"}
    assert row["tags"][4:9] == ["B-EMAIL", *["I-EMAIL"] * 4]
    assert row["tokens"][11:17] == ["(", "212", ")", "555", "-", "0101"]
    assert row["tags"][11:17] == ["B-PHONE", *["I-PHONE"] * 5]
    assert row["tags"][17] == "O"


# The artifacts


def test_there_is_one_adapter_and_one_call_for_each_task() -> None:
    assert {path.name for path in ADAPTERS.iterdir()} == set(ENCODER_TASKS)
    assert {name: (call.command, call.text, call.classes) for name, call in read_calls().items()} == {
        name: (task.command, task.demo, task.classes) for name, task in ENCODER_TASKS.items()
    }
    assert ENCODER_TASKS["contact"].classes == CLASSES
    assert len({(task.adapter.method, task.command) for task in ENCODER_TASKS.values()}) == len(ENCODER_TASKS)


@pytest.mark.parametrize("name", ENCODER_TASKS)
def test_adapter_is_small_and_is_what_its_card_says(name: str) -> None:
    files = {path.name: path for path in (ADAPTERS / name).iterdir() if path.is_file()}
    card = files.pop("README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| [\d,]+ \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    assert listed == {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in files.items()}
    size = sum(path.stat().st_size for path in files.values())
    assert size == read_results(ADAPTERS.parent)[name].num_bytes < MAX_BYTES


def test_results_of_all_tasks_are_in_the_documentation() -> None:
    results = read_results(ADAPTERS.parent)
    assert set(results) == set(ENCODER_TASKS)
    assert "\n".join(table(results)) in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


# The answers


@pytest.mark.real_model
async def test_all_tasks_at_once_answer_their_calls(server: Running) -> None:
    answers = {task: answer for task, _, _, answer in await ask_all(server.grpc, read_calls())}
    assert answers["concierge"].startswith("Radiators are set")
    assert answers["contact"] == "NAME Wendy Marino, EMAIL wendy.m@example.org, PHONE 555-0147"
    assert answers["intent"].startswith("lights on")
    assert answers["sentiment"].startswith("positive")
    assert answers["topic"].startswith("sport")


@pytest.mark.real_model
def test_every_suggested_command_does_what_it_says(server: Running) -> None:
    commands = [shlex.split(line) for line in server.printed if line.startswith("    ")]
    ours = [command for command in commands if Path(command[0]).name in ("manyhats", "curl", "python")]
    assert len(ours) >= 2 * len(ENCODER_TASKS)
    for command in ours:
        more = ["--fail", "--silent"] if command[0] == "curl" else []
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (done.returncode, bool(done.stdout)) == (0, True), (command, done.stderr)


@pytest.mark.real_model
@pytest.mark.parametrize("name", ENCODER_TASKS)
def test_served_answers_to_held_out_rows_are_mostly_right(name: str, server: Running) -> None:
    task = ENCODER_TASKS[name]
    rows = task.rows(Split.HELD_OUT)[:NUM_SERVED]
    with Client(server.grpc) as client:
        info = client.get_adapter(name)
        assert (info.kind, info.notes) == (KINDS[task.command].value, ())
        if task.command == "classify":
            found = client.classify([str(row["text"]) for row in rows], task_id=name).results
            right = [each.classes[0].label == row["label"] for each, row in zip(found, rows, strict=True)]
        elif task.command == "tag":
            texts = [" ".join(row["tokens"]) for row in rows]
            entities = [each.entities for each in client.tag(texts, task_id=name).results]
            right = [
                len(found) == sum(tag.startswith("B-") for tag in row["tags"])
                for found, row in zip(entities, rows, strict=True)
            ]
        else:
            known = client.embed(notes(), task_id=name).values
            asked = client.embed([str(row["query"]) for row in rows], task_id=name).values
            best = [max(range(len(known)), key=lambda at: _dot(vector, known[at])) for vector in asked]
            right = [notes()[at] == row["positive"] for at, row in zip(best, rows, strict=True)]
    assert sum(right) >= LEAST_RIGHT.get(name, OTHERS_LEAST_RIGHT) * len(rows)


def _dot(left: object, right: object) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))  # type: ignore[call-overload]


def test_a_mixed_call_without_a_server_is_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "examples.encoder.mixed_call", "127.0.0.1:1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: cannot reach the server at 127.0.0.1:1")
    assert "make run-encoder" in result.stderr
    assert result.stderr.count("\n") == 1
