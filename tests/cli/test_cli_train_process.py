"""``manyhats train`` as a process: interrupts, resuming, its heap, and a real server that serves what it made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from manyhats.client import Client
from manyhats.engine.home import default_home
from support.factories.tiny_models import SPECIAL_TOKENS, make_checkpoint

COMMAND = [sys.executable, "-m", "manyhats.cli"]
# The same, obeying interrupts even where the tests run in the background, and so ignore them.
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('manyhats.cli', run_name='__main__', alter_sys=True)",
]
ENVIRONMENT_OF_TRAIN = """
import os, sys
from manyhats.cli import main
main.app = lambda prog_name: print(os.environ.get("GLIBC_TUNABLES", ""), os.getpid(), sys.argv[1:])
main.main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and data; compiled kernels are those of the tests' own home."""
    directory = tmp_path_factory.mktemp("train")
    make_checkpoint(directory / "tiny")
    kernels = default_home() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (directory / "home").mkdir()
    (directory / "home" / "kernels").symlink_to(kernels)
    rows = [{"prompt": f"number {i}: ", "completion": "odd" if i % 2 else "even"} for i in range(24)]
    for name, part in (("train", rows[:16]), ("eval", rows[16:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory


def environment(place: Path) -> Mapping[str, str]:
    return {**os.environ, "MANYHATS_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}


def command(task: str, *more: str) -> list[str]:
    base = f"train qlora --task {task} --data train.jsonl --model tiny --device cpu --dtype float32 --batch-size 4"
    return [*base.split(), *more]


def run(place: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], cwd=place, env=environment(place), capture_output=True, text=True, timeout=120
    )


def test_interrupt_writes_a_checkpoint_exits_130_and_is_resumed(place: Path) -> None:
    steps = ["--epochs", "75"]
    with subprocess.Popen(
        [*INTERRUPTIBLE, *command("stopped", *steps)],
        cwd=place,
        env=environment(place),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any("step 1/300" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    last = said.splitlines()[-1]
    assert last.startswith("interrupted; can be resumed from tasks/stopped/training/checkpoints/step-")
    assert last.endswith("; the same command with --resume continues")
    assert "Traceback" not in said
    resumed = run(place, *command("stopped", *steps, "--resume", "--json"))
    assert resumed.returncode == 0, resumed.stderr
    assert "300 steps from step" in resumed.stderr
    assert len(json.loads(resumed.stdout)["report"]["steps"]) == 300


def test_the_command_runs_again_with_a_steady_heap_in_the_same_process() -> None:
    def says(*args: str, **given: str) -> tuple[str, str]:
        env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
        with subprocess.Popen(
            [sys.executable, "-c", ENVIRONMENT_OF_TRAIN, *args], env=env, stdout=subprocess.PIPE, text=True
        ) as process:
            printed, _ = process.communicate(timeout=30)
        tunables, pid, rest = printed.rstrip("\n").split(" ", 2)
        assert (pid, rest) == (str(process.pid), str(list(args)))
        return tunables, rest

    ours = "glibc.malloc.mxfast=0:glibc.malloc.tcache_count=0"
    assert says("train", "lora", "--x y")[0] == ours
    assert says("serve")[0] == ""
    assert says("train", GLIBC_TUNABLES="glibc.malloc.perturb=1")[0] == f"glibc.malloc.perturb=1:{ours}"
    assert says("train", GLIBC_TUNABLES="glibc.malloc.tcache_count=3")[0] == "glibc.malloc.tcache_count=3"


@contextmanager
def serving(place: Path) -> Iterator[str]:
    """A real server on the tiny model; gives its address."""
    flags = "--model tiny --store store --device cpu --dtype float32 --grpc-port 0 --http-port 0 --log-format json"
    with subprocess.Popen(
        [*COMMAND, "serve", *flags.split()],
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["grpc"])
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_a_running_server_serves_what_was_trained_as_the_trainer_scored_it(place: Path) -> None:
    with serving(place) as target, Client(target, timeout_s=60) as client:
        scoring = ["--eval", "eval.jsonl", "--label", "even", "--label", "odd"]
        result = run(place, *command("parity", "--epochs", "10", "--register", target, "--json", *scoring))
        assert result.returncode == 0, result.stderr
        printed: dict[str, Any] = json.loads(result.stdout)
        adapter = client.get_adapter("parity")
        assert adapter.state == "active"
        assert adapter.digest == printed["report"]["artifact"]["digest"]
        assert adapter.digest == printed["registration"]["adapter"]["digest"]
        rows = [json.loads(line) for line in (place / "eval.jsonl").read_text().splitlines()]
        num_right = 0
        for row in rows:
            labels = [label + SPECIAL_TOKENS[2] for label in ("even", "odd")]  # an answer has its end
            scores = client.score(row["prompt"], labels, task_id="parity").scores
            best = max(range(2), key=lambda index: scores[index].logprob)
            num_right += ("even", "odd")[best] == row["completion"]
        assert num_right == printed["report"]["evaluation"]["after"]["right"]


def test_a_running_server_classifies_as_the_trainer_s_report_says(place: Path) -> None:
    texts = [{"text": f"{'x' * (i % 7)} {i}", "label": "odd" if i % 2 else "even"} for i in range(60)]
    for name, part in (("texts", texts[:40]), ("held", texts[40:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with serving(place) as target, Client(target, timeout_s=60) as client:
        asked = "--data texts.jsonl --eval held.jsonl --head classification --json --epochs 4"
        more = [*asked.split(), "--learning-rate", "3e-3", "--register", target]
        result = run(place, *command("parity-head", *more))
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)["report"]
        answers = client.classify([row["text"] for row in texts[40:]], task_id="parity-head").results
        right = [answer.label == row["label"] for answer, row in zip(answers, texts[40:], strict=True)]
        assert sum(right) / 20 == report["evaluation"]["after"]["accuracy"]
