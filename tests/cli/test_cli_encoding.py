"""Commands that read texts, in this process, against the fake server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from manyhats.cli.tasks.texts import batches
from manyhats.v1 import adapter_pb2, encoding_pb2
from support.fakes.client import FakeServer


def run(fake: FakeServer, *args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [*args, "--server", fake.target], input=stdin, prog_name="manyhats")


def succeed(fake: FakeServer, *args: str, stdin: str = "") -> str:
    result = run(fake, *args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def rows(output: str) -> list[list[str]]:
    return [line.split("\t") for line in output.splitlines()]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("one\r\n\n  \ntwo\u2028too\n", encoding="utf-8")
    return str(path)


def test_embed_prints_a_vector_a_line(fake: FakeServer) -> None:
    assert succeed(fake, "embed", "a", "b", "--task", "docs") == "[0.0, 0.5]\n[1.0, 0.5]\n"
    assert (fake.last_request.task_id, fake.last_request.normalize) == ("docs", True)
    assert fake.last_request.pooling == adapter_pb2.POOLING_UNSPECIFIED


def test_embed_options_reach_the_server(fake: FakeServer) -> None:
    succeed(fake, "embed", "a", "--pooling", "mean", "--no-normalize", "--dimensions", "2")
    request = fake.last_request
    assert (request.pooling, request.normalize, request.dimensions) == (adapter_pb2.POOLING_MEAN, False, 2)
    result = run(fake, "embed", "a", "--pooling", "sum")
    assert result.exit_code == 1
    assert "pooling: must be one of none, first, last, mean, max, not 'sum'" in result.stderr


def test_embed_writes_files(fake: FakeServer, texts: str, tmp_path: Path) -> None:
    array, lines = tmp_path / "v.npy", tmp_path / "v.jsonl"
    for path in (array, lines):
        assert succeed(fake, "embed", "zero", "--file", texts, "--output", str(path)) == ""
    assert np.load(array).tolist() == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
    assert np.load(array).dtype == np.float32
    assert [json.loads(line) for line in lines.read_text(encoding="utf-8").split("\n") if line] == [
        {"text": "zero", "embedding": [0.0, 0.5]},
        {"text": "one", "embedding": [1.0, 0.5]},
        {"text": "two\u2028too", "embedding": [2.0, 0.5]},
    ]


def test_embed_says_what_it_cannot_write(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output in ("v.csv", "v"):
        result = run(fake, "embed", "a", "--output", output)
        assert (result.exit_code, "must end in .npy or .jsonl" in result.stderr) == (2, True)
    assert run(fake, "embed", "a", "--output", "v.npy", "--json").exit_code == 2
    assert fake.requests == []
    result = run(fake, "embed", "a", "--output", str(tmp_path / "none" / "v.jsonl"))
    assert (result.exit_code, "cannot write" in result.stderr) == (1, True)
    monkeypatch.setitem(sys.modules, "numpy", None)
    result = run(fake, "embed", "a", "--output", str(tmp_path / "v.npy"))
    assert (result.exit_code, "needs NumPy" in result.stderr) == (1, True)


def test_many_texts_go_in_several_calls(fake: FakeServer) -> None:
    lines = "".join(f"{number}\n" for number in range(300))
    assert len(succeed(fake, "embed", "--file", "-", stdin=lines).splitlines()) == 300
    requests: list[Any] = list(fake.requests)
    assert [len(request.inputs) for request in requests] == [256, 44]
    answers = [
        json.loads(line) for line in succeed(fake, "embed", "-f", "-", "--json", stdin=lines).splitlines()
    ]
    assert [len(answer["values"]) for answer in answers] == [256, 44]
    table = rows(succeed(fake, "classify", "--task", "mood", "-f", "-", stdin=lines))
    assert [row[0] for row in table[1:]] == lines.split()
    long = "x" * 600_000
    assert [len(batch) for batch in batches([long, "a", long, "b"])] == [2, 2]


def test_classify_prints_one_line_for_one_text(fake: FakeServer) -> None:
    assert succeed(fake, "classify", "--task", "mood", "The cake was dry.") == "good\t0.7500\n"
    assert list(fake.last_request.task_ids) == ["mood"]
    assert (fake.last_request.top_k, fake.last_request.raw_scores) == (1, False)
    succeed(fake, "classify", "--task", "mood", "--raw-scores", "a")
    assert fake.last_request.raw_scores


def test_classify_prints_what_there_are_several_of(fake: FakeServer) -> None:
    everything = rows(succeed(fake, "classify", "-t", "mood", "--all", "a"))
    assert everything == [["class", "score"], ["good", "0.7500"], ["bad", "0.2500"]]
    both = rows(succeed(fake, "classify", "-t", "mood", "-t", "topic@2", "a", "b"))
    assert both[0] == ["text", "task", "class", "score"]
    assert [row[:2] for row in both[1:]] == [["a", "mood"], ["a", "topic@2"], ["b", "mood"], ["b", "topic@2"]]
    tasks = rows(succeed(fake, "classify", "-t", "mood", "-t", "topic@2", "a"))
    assert tasks[:2] == [["task", "class", "score"], ["mood", "good", "0.7500"]]
    answer = json.loads(succeed(fake, "classify", "-t", "mood", "a", "--json"))
    assert answer["results"][0]["classes"][0] == {"label": "good", "index": 0, "score": 0.75, "logit": 1.5}


def test_tag_prints_entities_or_tokens(fake: FakeServer) -> None:
    assert rows(succeed(fake, "tag", "--task", "ner", "John lives in London.")) == [
        ["part", "class", "score", "start", "end"],
        ["John", "PER", "0.7500", "0", "4"],
    ]
    assert fake.last_request.aggregation == encoding_pb2.AGGREGATION_SIMPLE
    several = rows(succeed(fake, "tag", "--task", "ner", "John", "Jane", "--aggregation", "first"))
    assert [row[:3] for row in several] == [
        ["text", "part", "class"],
        ["1", "John", "PER"],
        ["2", "Jane", "PER"],
    ]
    assert fake.last_request.aggregation == encoding_pb2.AGGREGATION_FIRST
    tokens = rows(succeed(fake, "tag", "--task", "ner", "John", "--aggregation", "none"))
    assert tokens[1] == ["John", "B-PER", "0.7500", "0", "4"]
    assert (fake.last_request.aggregation, fake.last_request.top_k) == (0, 1)
    answer = json.loads(succeed(fake, "tag", "--task", "ner", "John", "--aggregation", "none", "--json"))
    assert len(answer["results"][0]["tokens"][0]["classes"]) == 2


def test_rerank_prints_the_best_first(fake: FakeServer, texts: str) -> None:
    output = succeed(fake, "rerank", "--task", "docs", "q", "zero", "--file", texts, "--top", "2")
    assert rows(output) == [["score", "text"], ["0.5000", "two\\u2028too"], ["0.2500", "one"]]
    assert (fake.last_request.query, fake.last_request.top_n) == ("q", 2)
    answer = json.loads(succeed(fake, "rerank", "--task", "docs", "q", "a", "b", "--json"))
    assert [(each["index"], each["text"]) for each in answer["results"]] == [(1, "b"), (0, "a")]


@pytest.mark.parametrize(
    "command", [["embed"], ["classify", "-t", "a"], ["tag", "-t", "a"], ["rerank", "-t", "a", "q"]]
)
def test_every_command_may_cut_long_texts(fake: FakeServer, command: list[str]) -> None:
    succeed(fake, *command, "text")
    assert fake.last_request.truncation == encoding_pb2.TRUNCATION_UNSPECIFIED
    succeed(fake, *command, "text", "--truncate")
    assert fake.last_request.truncation == encoding_pb2.TRUNCATION_END


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["embed"], "error: there is no text; give TEXT, or --file\n"),
        (["classify", "--task", "mood"], "error: there is no text; give TEXT, or --file\n"),
        (["embed", "a", ""], "error: TEXT must not be empty\n"),
        (["rerank", "--task", "docs", "", "a"], "error: QUERY must not be empty\n"),
        (["classify", "a"], "error: Missing option '--task'"),
        (["tag", "a"], "error: Missing option '--task'"),
        (["rerank", "q", "a"], "error: Missing option '--task'"),
        (["embed", "--file", "nothing.txt"], "error: --file: cannot read 'nothing.txt'"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_sent(
    fake: FakeServer, args: list[str], message: str
) -> None:
    result = run(fake, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message)
    assert fake.requests == []
