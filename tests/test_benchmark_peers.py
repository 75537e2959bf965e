"""The comparison with others' systems: what is read from them, who takes part, and what the table says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from benchmarks.environments import UnavailableError, make_once
from benchmarks.measure import Measurement, Sample
from benchmarks.peers import run
from benchmarks.peers.answers import answer_all, measure_answers, openai_ask
from benchmarks.peers.beside import MemoryWatch, family
from benchmarks.peers.llama_cpp import parse_batched_bench
from benchmarks.peers.llama_environment import make_llama_cpp
from benchmarks.peers.peer import (
    ANSWERS,
    DECODE,
    PREFILL,
    QUICK_LENGTHS,
    REQUIREMENTS,
    Bench,
    Lengths,
    Peer,
    PeerFailedError,
)
from benchmarks.peers.report import full_table, rows_of
from benchmarks.peers.rows import make_rows
from benchmarks.peers.servers import running
from benchmarks.report import evaluate
from benchmarks.workload import Adapter, Case, Workload, quick_settings

from support.factories.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[1]
SETTINGS = quick_settings(1)
WORKLOAD = Workload(
    settings=SETTINGS, model="m", directory=Path("m"), scratch=Path("s"), vocab_size=4096, linear_parameters=1
)
BENCH = Bench(WORKLOAD, QUICK_LENGTHS)


def test_the_last_run_of_llama_cpps_benchmark_counts() -> None:
    run = '{"pp": 16, "tg": 4, "pl": 2, "n_kv": 40, "t_pp": %s, "speed_pp": %s, "t_tg": %s, "speed_tg": %s}'
    first, last = run % (0.2232, 143.35, 0.0752, 106.41), run % (0.0888, 360.48, 0.0759, 105.39)
    measured = parse_batched_bench(f"\n{first}\n{last}\n\nllama_perf_context_print: total time\n")
    assert measured.figures == {PREFILL: 360.48, DECODE: 105.39}
    assert measured.times == {"prefill": [0.0888], "decode": [0.0759]}


def test_llama_cpps_benchmark_without_a_run_is_a_failure() -> None:
    with pytest.raises(PeerFailedError, match="tells of no run: llama_perf_context_print"):
        parse_batched_bench("\nllama_perf_context_print:        load time =     210.34 ms\n")


class Completions(BaseHTTPRequestHandler):
    """Answers completions with as many tokens as asked for; 13 it refuses, of 14 it forgets one."""

    asked: ClassVar[list[Mapping[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        num_tokens = body["max_tokens"]
        self.send_response(400 if num_tokens == 13 else 200)
        self.end_headers()
        usage = {"completion_tokens": num_tokens - (num_tokens == 14)}
        self.wfile.write(json.dumps({"error": "unlucky"} if num_tokens == 13 else {"usage": usage}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    Completions.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def model_of(adapter: Adapter | None) -> Mapping[str, str]:
    return {"model": "base" if adapter is None else adapter.name}


def test_every_stream_asks_with_a_prompt_and_an_adapter_of_its_own(address: str) -> None:
    measured = measure_answers(BENCH, Case(4, 2), 0, openai_ask(address, model_of))
    assert measured.figures[ANSWERS] > 0
    assert len(measured.times["answer"]) == 4
    prompts = [tuple(each["prompt"]) for each in Completions.asked]
    assert len(set(prompts)) == len(prompts) == 8  # the turn that warms up included
    assert {len(prompt) for prompt in prompts} == {QUICK_LENGTHS.answer_tokens}
    assert sorted(each["model"] for each in Completions.asked) == ["lora0"] * 4 + ["lora1"] * 4
    assert all(each["ignore_eos"] and each["temperature"] == 0 for each in Completions.asked)


@pytest.mark.parametrize(
    ("num_tokens", "said"), [(13, "400 .*unlucky"), (14, "has 13 tokens; 14 were asked for")]
)
def test_answer_that_is_refused_or_short_is_a_failure(address: str, num_tokens: int, said: str) -> None:
    with pytest.raises(PeerFailedError, match=said):
        answer_all(BENCH, Case(2), 0, openai_ask(address, model_of), (8, num_tokens))


SERVER = """
import http.server, os, subprocess, sys
print("as", os.environ["WHO"], flush=True)
if os.environ["WHO"] == "nobody":
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def serve(port: int) -> Sequence[str]:
    return [sys.executable, "-c", SERVER, str(port)]


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(PeerFailedError, match="ended with 3; its log ends with\nas nobody"),
        running(serve, {"WHO": "nobody"}),
    ):
        pass


def test_a_server_is_stopped_with_its_children() -> None:
    with running(serve, {"WHO": "me"}) as server:
        members = family(server.pid)
        assert len(members) == 2
    until_s = time.monotonic() + 30  # for the system to end what was killed
    while any(map(is_running, members)) and time.monotonic() < until_s:
        time.sleep(0.02)
    assert not any(map(is_running, members))


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_peak_memory_counts_a_child_that_has_given_it_back() -> None:
    source = "import time; x = b'x' * (64 << 20); time.sleep(2); del x; time.sleep(1)"
    with MemoryWatch(os.getpid()) as before:
        pass
    with MemoryWatch(os.getpid()) as watch:
        subprocess.run([sys.executable, "-c", source], check=True)
    assert before.peak_mib is not None
    assert watch.peak_mib is not None
    assert watch.peak_mib > before.peak_mib + 60


def sample(system: str, case: str, index: int, figures: Mapping[str, float], variant: str = "") -> Sample:
    return Sample(system=system, variant=variant, case=case, round=index, measurement=Measurement(figures))


def test_every_goal_against_a_peer_has_its_row() -> None:
    goals = {
        (row.subject, row.ours.case, row.against.system if row.against else "", row.floor.value)
        for row in make_rows(Lengths())
        if row.floor is not None
    }
    assert goals == {
        ("prompts", "base/1", "llama.cpp Q4_0", 1.3),
        ("prompts", "base/8", "llama.cpp Q4_0", 1.3),
        ("prompts", "base/32", "llama.cpp Q4_0", 1.3),
        ("prompts", "base/32", "llama.cpp Q4_0", 1.5),
        ("busy", "busy base/1", "engine", 0.45),
        ("busy", "busy base/32", "engine", 0.45),
        ("answers", "answers base/32", "llama-server", 1.3),
        ("answers", "answers lora/32x8", "llama-server", 6.0),
        ("answers", "answers base/32", "vllm", 3.0),
        ("answers", "answers lora/32x8", "vllm", 10.0),
        ("lora", "lora/32x32", "engine", 0.75),
        ("memory", "memory lora/32x32", "vllm", 0.6),
    }


def test_rows_of_a_peer_without_figures_are_named_with_the_reason() -> None:
    rows = rows_of(make_rows(Lengths()), ["llama.cpp", "vllm"])
    samples = [
        sample(system, case, index, {DECODE: speed})
        for index in range(3)
        for system, case, speed in (
            ("engine", "base/32", 300.0),
            ("llama.cpp Q4_0", "base/32", 100.0 + index),
        )
    ]
    shown = full_table(rows, evaluate(rows, samples), samples, {"vllm": "no index"})
    assert re.search(r"decode, 32 sequences, against llama.cpp Q4_0 +300 +101 .* ≥ 1.5x +ok", shown)
    assert "SKIPPED vllm: no index" in shown
    missing = "not measured (vllm): answers: gRPC, 32 streams, against vllm; its goal of 3x is not known"
    assert missing in shown
    assert "not measured (no figures): answers: HTTP, 8 streams, against gRPC\n" in shown
    assert "1 of 1 goals that were measured are reached." in shown
    assert "transformers" not in shown


def test_table_says_when_the_machine_was_not_quiet() -> None:
    rows = make_rows(Lengths())
    samples = [
        sample("engine", "base/1", 0, {DECODE: 20.0}),
        sample("llama.cpp Q4_0", "base/1", 0, {DECODE: 10.0}),
        sample("machine", "busy", 0, {"busy_cores": 0.1}, "before manyhats"),
        sample("machine", "busy", 0, {"busy_cores": 1.3}, "before vllm"),
        sample("machine", "busy", 0, {"busy_cores": 0.0}, "at the end"),
    ]
    shown = full_table(rows, evaluate(rows, samples), samples, {})
    assert shown.endswith("NOT QUIET: 1.3 cores busy with other work in round 1, before vllm")
    assert shown.count("NOT QUIET") == 1
    assert "DOUBTFUL" in shown


class Fake:
    """A peer that notes its visits, and fails in one round."""

    def __init__(self, name: str, visits: list[str], fails_in: int | None = None) -> None:
        self.name = name
        self._visits = visits
        self._fails_in = fails_in

    def visit(self, index: int) -> Iterator[Sample]:
        self._visits.append(f"{self.name} {index}")
        yield sample(self.name, "case", index, {"speed": 1.0})
        if index == self._fails_in:
            raise PeerFailedError("it broke")


def test_rounds_visit_every_peer_and_one_that_fails_no_more() -> None:
    visits: list[str] = []
    skipped: dict[str, str] = {"absent": "no index"}
    peers: list[Peer] = [
        Fake(name, visits, 0 if name == "weak" else None) for name in ("a", "weak", "absent")
    ]
    samples = list(run.measure(peers, replace(SETTINGS, rounds=2, quiet_check_s=0.01), skipped))
    assert visits == ["a 0", "weak 0", "a 1"]
    assert skipped == {"absent": "no index", "weak": "failed in round 1: it broke"}
    looks = [each.variant for each in samples if each.system == "machine"]
    assert looks == ["before a", "before weak", "before a", "at the end"]


def test_a_peer_whose_packages_are_missing_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(bench: Bench) -> Peer:
        raise UnavailableError("its packages cannot be installed")

    monkeypatch.setattr(run, "PEERS", {"gone": unavailable, "there": lambda bench: Fake("there", [])})
    skipped: dict[str, str] = {}
    peers = run.prepare(BENCH, ["gone", "there"], skipped)
    assert [peer.name for peer in peers] == ["manyhats", "there"]
    assert skipped == {"gone": "its packages cannot be installed"}


def test_llama_cpp_has_no_file_of_other_models() -> None:
    with pytest.raises(UnavailableError, match="a GGUF of smollm2-135m-instruct only, not of some/dir"):
        make_llama_cpp("some/dir")


def test_an_environment_is_made_again_by_another_recipe_only(tmp_path: Path) -> None:
    made: list[str] = []

    def recipe(name: str) -> Callable[[], None]:
        return lambda: made.append(name)

    for name in ("one", "one", "other"):
        make_once(tmp_path, name, recipe(name))
    assert made == ["one", "other"]


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.iterdir()), ids=lambda path: path.stem)
def test_every_version_is_written_down(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_unknown_peer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--peers", "vllm,colour"])
    assert "unknown: colour; there are llama.cpp, vllm, transformers" in capsys.readouterr().err


def test_quick_run_beside_a_peer_that_cannot_take_part(tmp_path: Path) -> None:
    model, path = make_checkpoint(tmp_path / "model"), tmp_path / "results.json"
    options = [
        "--quick",
        "--threads",
        "1",
        "--peers",
        "llama.cpp",
        "--model",
        str(model),
        "--json",
        str(path),
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    assert "SKIPPED llama.cpp: llama-cpp: there is a GGUF of smollm2-135m-instruct only" in finished.stdout
    assert "answers: HTTP, 32 streams over 32 LoRAs, against gRPC" in finished.stdout
    document = json.loads(path.read_text())
    assert document["settings"]["skipped"].keys() == {"llama.cpp"}
    cases = {(each["system"], each["case"]) for each in document["samples"]}
    assert cases >= {
        ("engine", "context/96"),
        ("engine", "busy base/32"),
        ("grpc", "answers lora/32x8"),
        ("http", "answers base/1"),
        ("grpc", "memory lora/32x32"),
    }
