"""Commands that talk to a server, in this process, against the fake server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from manyhats.v1 import generation_pb2
from support.fakes.client import PIECES, TEXT, FakeServer, make_status


def run(fake: FakeServer, *args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [*args, "--server", fake.target], input=stdin, prog_name="manyhats")


def succeed(fake: FakeServer, *args: str, stdin: str = "") -> str:
    result = run(fake, *args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def succeed_json(fake: FakeServer, *args: str) -> Any:
    return json.loads(succeed(fake, *args, "--json"))


def test_generate_prints_the_answer(fake: FakeServer) -> None:
    assert succeed(fake, "generate", "hi", "--task", "sql@2") == TEXT + "\n"
    assert (fake.last_request.text, fake.last_request.task_id) == ("hi", "sql@2")
    assert not fake.last_request.HasField("sampling")


def test_generate_streams(fake: FakeServer) -> None:
    assert succeed(fake, "generate", "hi", "--stream") == TEXT + "\n"


def test_generate_json_is_the_whole_answer(fake: FakeServer) -> None:
    answer = succeed_json(fake, "generate", "hi", "--task", "sql", "--logprobs", "1")
    assert answer["text"] == TEXT
    assert answer["finish_reason"] == "eos"
    assert answer["adapter"] == {"task_id": "sql", "version": 2, "digest": "sha256:ab"}
    assert answer["tokens"][0]["top"] == [{"id": 99, "text": "best", "logprob": -0.1}]
    assert answer["usage"]["prompt_tokens"] == 7


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_logprobs_without_json_are_refused(fake: FakeServer, more: list[str]) -> None:
    result = run(fake, "generate", "hi", "--logprobs", "1", *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --logprobs needs --json, which shows them\n"


def test_an_empty_prompt_is_refused_by_its_argument(fake: FakeServer) -> None:
    for prompt in ("", "-"):
        result = run(fake, "generate", prompt)
        assert (result.exit_code, result.stderr) == (2, "error: PROMPT must not be empty\n")


def test_generate_shows_several_answers(fake: FakeServer) -> None:
    assert succeed(fake, "generate", "hi", "--num-sequences", "3") == f"{TEXT}\n---\n{TEXT}1\n---\n{TEXT}2\n"
    assert fake.last_request.num_sequences == 3
    answer = succeed_json(fake, "generate", "hi", "--num-sequences", "2")
    assert [each["text"] for each in answer["more"]] == [f"{TEXT}1"]
    lines = succeed(fake, "generate", "hi", "--num-sequences", "2", "--stream", "--json").splitlines()
    pieces = [json.loads(line) for line in lines]
    for index in (0, 1):
        assert "".join(each["text"] for each in pieces if each["sequence_index"] == index) == TEXT
    result = run(fake, "generate", "hi", "--num-sequences", "2", "--stream")
    assert result.exit_code == 2
    assert "--stream shows one answer; with --num-sequences it needs --json" in result.stderr


def test_generate_takes_a_constraint(fake: FakeServer, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "s.json", tmp_path / "g.lark"
    schema.write_text('{"type": "null"}')
    grammar.write_text('start: "é"', encoding="utf-8")
    for option, value, field, sent in (
        ("--json-schema", str(schema), "json_schema", '{"type": "null"}'),
        ("--json-schema", '{"type": "string"}', "json_schema", '{"type": "string"}'),
        ("--grammar", str(grammar), "grammar", 'start: "é"'),
        ("--grammar", 'start: "b"', "grammar", 'start: "b"'),
        ("--regex", "a+", "regex", "a+"),
    ):
        succeed(fake, "generate", "hi", option, value)
        assert getattr(fake.last_request, field) == sent
    succeed(fake, "generate", "hi", "--choice", "yes", "--choice", "no")
    assert list(fake.last_request.choice.options) == ["yes", "no"]
    result = run(fake, "generate", "hi", "--json-schema", str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --json-schema: cannot read")
    result = run(fake, "generate", "hi", "--regex", "a", "--choice", "b")
    assert "choice: is given besides regex" in result.stderr


def test_generate_stream_json_is_a_line_per_piece(fake: FakeServer) -> None:
    lines = succeed(fake, "generate", "hi", "--stream", "--json").splitlines()
    pieces = [json.loads(line) for line in lines]
    assert [piece["text"] for piece in pieces] == list(PIECES)
    assert [piece["finish_reason"] for piece in pieces] == [None, None, None, "eos"]


def test_generate_shows_special_tokens_where_asked_to(fake: FakeServer) -> None:
    succeed(fake, "generate", "hi")
    assert not fake.last_request.response.HasField("skip_special_tokens")
    succeed(fake, "generate", "hi", "--show-special-tokens")
    assert fake.last_request.response.skip_special_tokens is False
    succeed(fake, "generate", "hi", "--skip-special-tokens")
    assert fake.last_request.response.skip_special_tokens is True


def test_generate_reads_the_prompt_from_stdin(fake: FakeServer) -> None:
    succeed(fake, "generate", "-", stdin="from\nstdin\n")
    assert fake.last_request.text == "from\nstdin\n"


def test_generate_as_a_chat_message(fake: FakeServer) -> None:
    succeed(fake, "generate", "hi", "--chat")
    assert [(m.role, m.content) for m in fake.last_request.chat.messages] == [("user", "hi")]
    succeed(fake, "generate", "hi", "--system", "be brief")
    assert [m.role for m in fake.last_request.chat.messages] == ["system", "user"]


def test_generate_passes_every_option(fake: FakeServer) -> None:
    flags = "--temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.25 --repetition-penalty 1.5 --seed 7"
    succeed(fake, "generate", "hi", *flags.split(), "-n", "9", "--stop", "a", "--stop", "b")
    sampling, stopping = fake.last_request.sampling, fake.last_request.stopping
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 4, 0.75)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.25, 1.5, 7)
    assert (stopping.max_new_tokens, list(stopping.stop_sequences)) == (9, ["a", "b"])
    assert not fake.last_request.HasField("speculation")
    succeed(fake, "generate", "hi", "--speculation", "6")
    assert fake.last_request.speculation.num_tokens == 6


def test_server_may_come_from_the_environment(fake: FakeServer) -> None:
    result = CliRunner(env={"MANYHATS_SERVER": fake.target}).invoke(app, ["info"])
    assert result.exit_code == 0
    assert "tiny-base" in result.stdout


def test_timeout(fake: FakeServer) -> None:
    fake.delay_s = 0.5
    result = run(fake, "generate", "hi", "--timeout", "0.05")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_chat_remembers_the_conversation_until_reset(fake: FakeServer) -> None:
    out = succeed(fake, "chat", "--system", "be brief", stdin="one\n\n  two \n/reset\nthree\n/exit\nfour\n")
    assert out == (TEXT + "\n") * 3
    said = [[(m.role, m.content) for m in request.chat.messages] for request in fake.requests]  # type: ignore[attr-defined]
    system, answer = ("system", "be brief"), ("assistant", TEXT)
    assert said == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]


def test_chat_json_is_a_line_per_answer(fake: FakeServer) -> None:
    lines = succeed(fake, "chat", "--json", stdin="one\ntwo\n").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [TEXT, TEXT]


def test_chat_fails_where_nobody_can_react(fake: FakeServer) -> None:
    fake.status = make_status(grpc.StatusCode.NOT_FOUND, "no task 'sqq'", reason="TASK_NOT_FOUND")
    result = run(fake, "chat", "--task", "sqq", stdin="one\ntwo\n")
    assert (result.exit_code, len(fake.requests)) == (1, 1)


def test_score_prints_the_best_first(fake: FakeServer) -> None:
    rows = [line.split("\t") for line in succeed(fake, "score", "2+2=", " 4", " 5").splitlines()]
    assert rows[0] == ["continuation", "logprob", "tokens", "per token"]
    assert rows[1] == [" 4", "-1.0000", "2", "-0.5000"]
    assert rows[2][0] == " 5"


def test_score_json_keeps_the_order_asked(fake: FakeServer) -> None:
    scores = succeed_json(fake, "score", "2+2=", " 4", " 5")["scores"]
    assert [score["logprob"] for score in scores] == [-1.0, -2.0]


def test_register_names_what_it_made(fake: FakeServer, tmp_path: Path) -> None:
    result = run(
        fake,
        "adapters",
        "register",
        "sql",
        str(tmp_path),
        "--label",
        "team=a",
        "--no-activate",
        "--assume-base",
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("registered: sql@3 (lora, active, 1.2 MB, effect 0.25, sha256:")
    assert result.stderr == "note: names no base\n"
    assert (fake.last_request.uri, dict(fake.last_request.labels)) == (str(tmp_path), {"team": "a"})
    assert not fake.last_request.activate
    assert fake.last_request.assume_base


def test_register_makes_paths_of_this_machine_absolute(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sql").mkdir()
    for given, sent in (
        ("sql", str(tmp_path / "sql")),
        ("elsewhere", "elsewhere"),
        ("s3://b/sql", "s3://b/sql"),
    ):
        run(fake, "adapters", "register", "sql", given)
        assert fake.last_request.uri == sent


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([], ""),
        (["--label", "team=a"], ""),
        (["--label", "class.0=a"], "note: sql@3 keeps the labels that it was registered with\n"),
    ],
)
def test_labels_that_an_existing_version_does_not_get_are_said(
    fake: FakeServer, labels: list[str], note: str, as_json: list[str]
) -> None:
    fake.has_versions = True
    result = run(fake, "adapters", "register", "sql", "/adapters/sql", *labels, *as_json)
    assert result.exit_code == 0
    assert result.stderr.replace("note: names no base\n", "") == note


def test_register_json(fake: FakeServer) -> None:
    registration = succeed_json(fake, "adapters", "register", "sql", "/adapters/sql")
    assert registration["created"] is True
    assert registration["adapter"]["create_time"] == "2026-03-01T12:30:00+00:00"


def test_register_of_parts(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sql").mkdir()
    parts = ["--part", "sql", "--part", "s3://b/polite=0.5", "--part", "/a=b", "--part", "c=-1e-1"]
    assert run(fake, "adapters", "register", "both", *parts).exit_code == 0
    assert [(part.uri, part.weight) for part in fake.last_request.parts] == [
        (str(tmp_path / "sql"), 1.0),
        ("s3://b/polite", 0.5),
        ("/a=b", 1.0),
        ("c", -0.1),
    ]
    assert fake.last_request.uri == ""


def test_upload_sends_the_directory_and_shows_that_it_goes_on(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    result = run(
        fake,
        "adapters",
        "upload",
        "sql",
        str(tmp_path),
        "--label",
        "team=a",
        "--request-id",
        "r1",
        "--assume-base",
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("uploaded: sql@3 (lora, active, 1.2 MB, effect 0.25, sha256:")
    assert result.stderr == "upload ...\nnote: names no base\n"
    assert fake.uploaded == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert (dict(fake.last_request.labels), fake.last_request.request_id) == ({"team": "a"}, "r1")
    assert fake.last_request.assume_base


def test_upload_of_no_adapter_is_an_error(fake: FakeServer, tmp_path: Path) -> None:
    result = run(fake, "adapters", "upload", "sql", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: directory: {tmp_path} has no adapter_config.json\n"


def test_activate(fake: FakeServer) -> None:
    out = succeed(fake, "adapters", "activate", "sql@1")
    assert out.startswith("active: sql@1 (lora, sha256:")
    assert succeed_json(fake, "adapters", "activate", "sql@2")["version"] == 2


def test_pin_and_unpin(fake: FakeServer) -> None:
    assert succeed(fake, "adapters", "pin", "sql") == "pinned: sql@2, the active version of sql\n"
    assert succeed(fake, "adapters", "pin", "sql@2") == "pinned: sql@2\n"
    assert fake.last_request.task_id == "sql@2"
    assert succeed(fake, "adapters", "unpin", "sql") == "unpinned: sql\n"
    still = succeed(fake, "adapters", "unpin", "sql@2")
    assert still == "sql@2 is still pinned as the active version: unpin sql\n"
    assert succeed_json(fake, "adapters", "pin", "sql")["pinned"] is True


def test_list(fake: FakeServer) -> None:
    lines = succeed(fake, "adapters", "list").splitlines()
    assert lines[0].split("\t")[0] == "task"
    assert [line.split("\t")[0] for line in lines[1:]] == ["sql@1", "sql@2", "tldr@1"]
    assert len(succeed_json(fake, "adapters", "list", "sql")) == 2


def test_list_of_nothing_says_so_but_is_no_error(fake: FakeServer) -> None:
    fake.adapters.clear()
    result = run(fake, "adapters", "list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no adapters are registered\n")
    assert succeed_json(fake, "adapters", "list") == []


def test_show(fake: FakeServer) -> None:
    lines = succeed(fake, "adapters", "show", "sql").splitlines()
    assert {"task: sql@2", "size: 1.2 MB", "parameters: 300 k", "labels: team=a"} <= set(lines)
    assert "created: 2026-03-01 12:30:00 UTC" in lines
    assert {"kind: classify", "classes: good, bad", "pooling: last"} <= set(lines)
    assert {"effect: 0.25 nats", "part 0: 0.5 × /adapters/sql (sha256:aa)"} <= set(lines)
    assert succeed_json(fake, "adapters", "show", "sql@2")["version"] == 2


def test_delete(fake: FakeServer) -> None:
    assert succeed(fake, "adapters", "delete", "sql", "--force") == "deleted: sql@1, sql@2\n"
    assert fake.last_request.force
    assert [info["version"] for info in succeed_json(fake, "adapters", "delete", "sql")] == [1, 2]


def test_info(fake: FakeServer) -> None:
    lines = succeed(fake, "info").splitlines()
    assert "context: 8192 tokens" in lines
    assert {"attention: causal", "embeddings: 576 values, pooling last"} <= set(lines)
    assert (
        "requests: 32 run at once, 256 wait, with at most 1024 continuations; no message may exceed 7.629 MiB"
        in lines
    )
    assert "adapters: 8 run at once, each of up to 1.863 GiB, rank 64, 512 virtual tokens, 16 parts" in lines
    assert "transfers: 4 at a time" in lines
    assert "store: tasks: 7, per task: 8.583 MiB" in lines
    limits = succeed_json(fake, "info")["limits"]
    assert (limits["max_tasks"], limits["max_versions_per_task"], limits["max_bytes"]) == (7, None, None)
    fake.is_old = True
    assert not [line for line in succeed(fake, "info").splitlines() if line.startswith(("requests", "store"))]
    assert succeed_json(fake, "info")["limits"] is None
    assert succeed_json(fake, "info")["base_model"] == "tiny-base"


@pytest.mark.parametrize(
    ("code", "reason", "message", "hint"),
    [
        (grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND", "no task 'sqq'", "adapters list"),
        (
            grpc.StatusCode.FAILED_PRECONDITION,
            "NO_ACTIVE_VERSION",
            "none of sql is active",
            "adapters activate",
        ),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full", "try again in 0.01 s"),
        (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "top_p: must\nbe in (0, 1]", ""),
        (grpc.StatusCode.UNAVAILABLE, "", "gone", "is `manyhats serve` running there?"),
    ],
)
def test_an_error_is_one_line_on_stderr(
    fake: FakeServer, code: grpc.StatusCode, reason: str, message: str, hint: str
) -> None:
    fake.status = make_status(code, message, reason=reason, retry_after_s=0.01)
    for args in (["generate", "hi"], ["generate", "hi", "--stream"], ["generate", "hi", "--json"]):
        result = run(fake, *args)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")
        assert message.replace("\n", " ") in result.stderr
        assert hint in result.stderr


def test_an_error_in_mid_stream_keeps_what_came(fake: FakeServer) -> None:
    fake.status = make_status(grpc.StatusCode.INTERNAL, "non-finite logits", reason="NUMERICAL_ERROR")
    fake.fail_stream_after = 2
    result = run(fake, "generate", "hi", "--stream")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Hello, ", "error: non-finite logits\n")


def test_a_bug_is_one_line_too_and_shows_its_place_on_demand(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> str:
        raise RuntimeError("bug")

    monkeypatch.setattr("manyhats.cli.info.print_json", broken)
    result = run(fake, "info", "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected RuntimeError: bug")
    monkeypatch.setenv("MANYHATS_DEBUG", "1")
    assert "Traceback" in run(fake, "info", "--json").stderr


BEYOND = (
    "note: 100000 tokens (--max-new-tokens) do not fit: prompt and answer share the context of 8192,"
    " and the answer ends there\n"
)
CUT = "note: cut after 4 of {} tokens (--max-new-tokens): prompt and answer fill the context of 8192\n"


@pytest.mark.parametrize("limit", [None, 4, 5, 300, 100_000])
@pytest.mark.parametrize(
    "command", [["generate", "hi", "--stream"], ["generate", "hi", "--stream", "--json"], ["chat"]]
)
def test_an_answer_that_the_context_cut_short_is_said_to_be(
    fake: FakeServer, command: list[str], limit: int | None
) -> None:
    fake.stream_finish_reason = generation_pb2.FINISH_REASON_LENGTH
    limits = [] if limit is None else ["--max-new-tokens", str(limit)]
    result = run(fake, *command, *limits, stdin="hi\n")
    assert result.exit_code == 0
    beyond = BEYOND if limit == 100_000 else ""
    assert result.stderr == ("" if limit == 4 else beyond + CUT.format(limit or 256))
    # Of a task, a limit that was not given is not known: it may be the task's own.
    of_task = run(fake, *command, "--task", "sql", *limits, stdin="hi\n")
    assert of_task.stderr == ("" if limit is None else result.stderr)
