"""``manyhats bench`` against a server with canned answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from manyhats.cli.main import app
from manyhats.client import AsyncClient
from manyhats.load.run import LEFT, OK, run_load
from manyhats.load.workload import Workload, arrivals
from manyhats.v1.adapter_pb2 import ActivateAdapterRequest
from manyhats.v1.generation_pb2 import GenerateRequest
from support.fakes.client import PIECES, FakeServer, make_status, running_server

QUICK = ["--rate", "20", "--duration", "1", "--task", "sql", "--task", "tldr"]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running_server() as server:
        yield server


def run(fake: FakeServer, *args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args, "--server", fake.target], prog_name="manyhats")


def asked(fake: FakeServer) -> list[GenerateRequest]:
    return [request for request in fake.requests if isinstance(request, GenerateRequest)]


async def load(fake: FakeServer, workload: Workload, **versions: list[int]) -> list[str]:
    async with AsyncClient(fake.target, retries=False) as client:
        return [answer.outcome for answer in await run_load(client, workload, ["sql", "tldr"], versions)]


def test_every_request_is_sent_when_it_is_due_and_as_it_was_planned(fake: FakeServer) -> None:
    workload = Workload(rate=30, duration_s=1, seed=3)
    outcomes = asyncio.run(load(fake, workload))
    planned = list(arrivals(workload, ["sql", "tldr"]))
    assert outcomes == [OK] * len(planned)
    sent = asked(fake)
    assert Counter((each.text, each.task_id, each.stopping.max_new_tokens) for each in sent) == Counter(
        (each.prompt, each.task, each.num_tokens) for each in planned
    )
    assert all(each.stopping.ignore_eos for each in sent)


def test_callers_leave_and_the_server_hears_of_it(fake: FakeServer) -> None:
    fake.is_endless = True
    workload = Workload(rate=10, duration_s=0.5, cancel_share=1.0, answer_tokens=(2, 3))
    outcomes = asyncio.run(load(fake, workload))
    assert outcomes
    assert set(outcomes) == {LEFT}
    assert fake.stream_ended.wait(10)


def test_versions_are_swapped_where_there_are_several(fake: FakeServer) -> None:
    asyncio.run(load(fake, Workload(rate=20, duration_s=1, swap_every_s=0.1), sql=[1, 2], tldr=[1]))
    swaps = [each.task_id for each in fake.requests if isinstance(each, ActivateAdapterRequest)]
    assert swaps
    assert set(swaps) <= {"sql@1", "sql@2"}


def test_the_table_and_the_files_tell_the_same(fake: FakeServer, tmp_path: Path) -> None:
    files = tmp_path / "load.json", tmp_path / "load.png"
    result = run(fake, *QUICK, "--report", str(files[0]), "--plot", str(files[1]))
    assert (result.exit_code, result.stderr) == (0, "")
    header, everything, *_ = [line.split("\t") for line in result.stdout.splitlines()]
    found = json.loads(files[0].read_text())
    assert found["all"]["num_requests"] == found["all"]["num_ok"] == int(everything[1]) == len(asked(fake))
    assert found["all"]["num_tokens"] == len(PIECES) * len(asked(fake))
    assert header[0] == "task"
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_a_greedy_load_says_what_it_did_to_the_others(fake: FakeServer) -> None:
    result = run(
        fake, "--preset", "greedy", "--rate", "5", "--duration", "3", "--task", "sql", "--task", "tldr"
    )
    assert result.exit_code == 0
    assert "first tokens of the others, p95: " in result.stdout
    assert " while it was greedy: " in result.stdout


def test_failures_are_counted_by_reason(fake: FakeServer) -> None:
    fake.status = make_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL")
    outcomes = asyncio.run(load(fake, Workload(rate=20, duration_s=0.5)))
    assert set(outcomes) == {"QUEUE_FULL"}


def test_every_refusal_is_counted_though_the_server_says_when_to_come_back(fake: FakeServer) -> None:
    fake.status = make_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after_s=0.001
    )
    fake.fail_stream_after = 0
    result = run(fake, "--task", "sql", "--rate", "20", "--duration", "0.5", "--json")
    assert json.loads(result.stdout)["all"]["failures"] == {"QUEUE_FULL": len(asked(fake))}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--preset", "none"], 2, "--preset must be one of steady, zipf,"),
        (["--popularity", "much"], 2, "--popularity must be one of uniform,"),
        (["--rate", "0"], 2, "--rate must be above 0"),
        (["--prompt-tokens", "9:3"], 2, "--prompt-tokens must be A:B"),
        (["--answer-tokens", "x"], 2, "--answer-tokens must be A:B"),
        (["--task", "sql", "--task", "nothing"], 1, "no such task: nothing"),
        ([], 1, "the server has no task that generates"),
        (["--task", "sql", "--duration", "0.0001", "--rate", "0.001"], 1, "no request came"),
        ([*QUICK, "--report", "/proc/no/such.json"], 1, "cannot write:"),
        ([*QUICK, "--plot", "picture.what"], 1, "cannot write:"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    fake: FakeServer,
    args: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(fake, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
