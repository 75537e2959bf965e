"""A process whose engine hangs, is stopped, or takes long, as its callers and its parent see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from manyhats.v1 import adapter_pb2
from manyhats.v1 import generation_pb2 as pb
from manyhats.v1.adapter_pb2_grpc import AdapterServiceStub
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.factories.tiny_models import make_checkpoint

# The engine's next step does what is said on stdin; each row takes some more seconds.
CHILD = """
import asyncio, sys, threading, time
from manyhats.adapters.store.store import AdapterStore
from manyhats.cli.serve import run
from manyhats.engine.backends.cpu.model import CpuModel
from manyhats.server.lifetime.config_file import make_config

forward, task, lock = CpuModel.forward, [""], threading.Lock()
refresh, store_hangs = AdapterStore.refresh, threading.Event()

def read():
    for line in sys.stdin:
        if line.strip() == "store":
            store_hangs.set()
        task[0] = line.strip()

def faulty(self, *arguments):
    word, task[0] = task[0], ""
    if word == "wait":
        threading.Event().wait()
    elif word == "lock":
        lock.acquire(); lock.acquire()
    elif word == "die":
        raise SystemExit("the thread ends")
    elif word.startswith("compute"):
        compute(float(word.split()[1]))
    compute(float(sys.argv[5]) * arguments[0].token_ids.size)
    return forward(self, *arguments)

def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(10_000))

def hanging(self, *arguments, **named):
    if store_hangs.is_set():
        threading.Event().wait()
    return refresh(self)

CpuModel.forward, AdapterStore.refresh, AdapterStore.delete = faulty, hanging, hanging
threading.Thread(target=read, daemon=True).start()
config = make_config({
    "model": sys.argv[1], "store": sys.argv[2], "dtype": "float32", "quantization": "none", "num_threads": 1,
    "kv_cache_bytes": 4 << 20, "grpc_port": 0, "http_port": 0, "log_format": "json",
    "heartbeat_limit_s": float(sys.argv[3]), "hang_limit_s": float(sys.argv[4]), "drain_limit_s": 60.0,
})
sys.exit(run(config))
"""
PYTHONPATH = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hang") / "base", seed=5)


@dataclass
class Server:
    """A process, and callers of it."""

    process: subprocess.Popen[str]
    channel: grpc.Channel
    http: str
    states: list[tuple[float, bool]] = field(default_factory=list)

    def tell(self, task: str) -> None:
        """Have the next step do this."""
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        time.sleep(0.3)

    def generate(self, text: str = "hello") -> grpc.Future[pb.GenerateResponse]:
        request = pb.GenerateRequest(text=text, stopping=pb.StoppingParams(max_new_tokens=3))
        return GenerationServiceStub(self.channel).Generate.future(request)

    def is_serving(self) -> bool:
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def ask(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode().strip()


@contextmanager
def server(
    base: Path, store: Path, heartbeat_limit_s: float, hang_limit_s: float, row_s: float = 0.0
) -> Iterator[Server]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    limits = str(heartbeat_limit_s), str(hang_limit_s), str(row_s)
    command = [sys.executable, "-c", CHILD, str(base), str(store), *limits]
    log = store.with_suffix(".log")
    pipe = subprocess.PIPE
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            ready = json.loads(line)
            with grpc.insecure_channel(ready["grpc"]) as channel:
                found = Server(process, channel, ready["http"])
                assert found.generate().result(60).text is not None
                yield found
        finally:
            process.kill()


def until(condition: Callable[[], bool], limit_s: float) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.parametrize("how", ["wait", "lock", "compute 1000"])
def test_a_step_that_never_returns_turns_health_and_ends_the_process(
    base: Path, tmp_path: Path, how: str
) -> None:
    store = tmp_path / "store"
    with server(base, store, 4.0, 9.0) as serving:  # the first is the default
        serving.tell(how)
        hanging = serving.generate()
        # Five seconds, and what a busy machine may take to look.
        assert until(lambda: not serving.is_serving(), 20) < 5 + 5
        assert serving.ask("/readyz") == (503, "stalled")
        assert serving.ask("/healthz") == (200, "ok")
        metrics = serving.ask("/metrics")[1]
        (line,) = [
            line for line in metrics.splitlines() if line.startswith("manyhats_engine_heartbeat_times")
        ]
        assert time.time() - float(line.split()[1]) > 3, "the same silence"
        assert serving.process.wait(40) == 70
        with pytest.raises(grpc.RpcError) as caught:
            hanging.result(10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    log = store.with_suffix(".log").read_text()
    (told,) = [
        json.loads(line) for line in log.splitlines() if line.startswith("{") and "the engine hangs" in line
    ]
    assert told["silent_s"] >= 9
    assert "in faulty" in told["where"]
    assert "most recent call first" in log, "the stacks of all threads"


def test_a_thread_that_dies_ends_the_process(base: Path, tmp_path: Path) -> None:
    with server(base, tmp_path / "store", 4.0, 30.0) as serving:
        serving.tell("die")
        dying = serving.generate()
        assert serving.process.wait(40) == 1
        with pytest.raises(grpc.RpcError) as caught:
            dying.result(10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
def test_a_long_step_and_a_stopped_process_are_no_hang(base: Path, tmp_path: Path) -> None:
    """Limits far below both: on a slow machine the first steps take seconds, and a long prompt's takes longer."""
    with server(base, tmp_path / "store", 1.5, 3.0, row_s=0.2) as serving:
        states: list[bool] = []
        ends = threading.Event()

        def look() -> None:
            while not ends.wait(0.1):
                states.append(serving.is_serving())

        looking = threading.Thread(target=look)
        looking.start()
        started = time.monotonic()
        assert serving.generate("a word " * 15).result(120).text is not None
        assert time.monotonic() - started > 6, "not long enough to tell"
        ends.set()
        looking.join()
        assert states
        assert all(states)
        for word in ("", "compute 2"):  # idle, and within a step
            if word:
                serving.tell(word)
            answer: Any = serving.generate()
            time.sleep(0.5)
            serving.process.send_signal(signal.SIGSTOP)
            time.sleep(6)
            serving.process.send_signal(signal.SIGCONT)
            assert serving.is_serving()
            assert answer.result(60).text is not None
            time.sleep(1)
            assert serving.is_serving()
            assert serving.process.poll() is None


def test_a_second_signal_ends_a_process_at_once_whatever_its_engine_does(base: Path, tmp_path: Path) -> None:
    with server(base, tmp_path / "store", 4.0, 60.0) as serving:
        serving.tell("wait")
        hanging = serving.generate()
        time.sleep(0.5)
        serving.process.send_signal(signal.SIGTERM)
        until(lambda: serving.ask("/readyz") == (503, "draining"), 20)
        with pytest.raises(grpc.RpcError) as caught:
            serving.generate().result(10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not hanging.done()
        serving.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert serving.process.wait(30) == 0
        assert time.monotonic() - started < 20, "long before the limit of 60 s"


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_store_that_hangs_does_not_hold_up_the_end(base: Path, tmp_path: Path, num_signals: int) -> None:
    with server(base, tmp_path / "store", 4.0, 60.0) as serving:
        serving.tell("store")
        time.sleep(1)  # a look, by default twice a second
        if num_signals == 2:  # before it is known that the store hangs
            request = adapter_pb2.DeleteAdapterRequest(task_id="none")
            deleting = AdapterServiceStub(serving.channel).DeleteAdapter.future(request)
            time.sleep(0.5)
            assert not deleting.done()
        assert serving.generate().result(60).text is not None
        assert serving.is_serving()
        for _ in range(num_signals):
            serving.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert serving.process.wait(20) == 0
