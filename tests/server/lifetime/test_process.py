"""The life of a server process: loading, ready, draining, death, and both signals."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import prometheus_client
import pytest

from manyhats.adapters.errors import SourceNotFoundError
from manyhats.engine.errors import ModelError
from manyhats.engine.progress import Progress
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.config_file import make_config
from manyhats.server.lifetime.process import ShowProgress, serve
from manyhats.server.lifetime.serving import Assemble
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.backend import Backend
from manyhats.v1 import generation_pb2 as pb
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.fakes.server import (
    EchoEngine,
    MemoryStore,
    eventually,
    make_backend,
    make_record,
    refusal_of,
    refused,
)

if TYPE_CHECKING:
    from manyhats.v1.generation_pb2_grpc import GenerationServiceAsyncStub

CHILD = """
import asyncio, sys
from pathlib import Path
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.process import serve
from support.fakes.server import EchoEngine, MemoryStore, make_backend

config = ServeConfig(
    model="echo", store=Path("/nowhere"), grpc_port=0, http_port=0, log_format="json", register={"hats": "/a"}
)
backend = make_backend(EchoEngine(), MemoryStore())
sys.exit(asyncio.run(serve(config, assemble=lambda config, metrics, progress: backend)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_line_answer_and_clean_end_by_signal(number: signal.Signals) -> None:
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        with grpc.insecure_channel(facts["grpc"]) as channel:
            answer = GenerationServiceStub(channel).Generate(pb.GenerateRequest(task_id="hats", text="hi"))
        process.send_signal(number)
        rest, log = process.communicate(timeout=20)
    assert (facts["event"], facts["model"]) == ("ready", "echo")
    assert facts["startup_seconds"] >= 0
    assert (answer.text, answer.adapter.version) == ("hi", 1)
    assert process.returncode == 0
    assert rest == ""
    assert "drained" in [json.loads(line)["event"] for line in log.splitlines()]


class Life:
    """A server that runs as a task of this process, and what it printed."""

    def __init__(self, task: asyncio.Task[int], capsys: pytest.CaptureFixture[str]) -> None:
        self.task = task
        self._capsys = capsys
        self.text = ""

    async def line(self, event: str) -> dict[str, Any]:
        """Waits for a line, of the log or on stdout, about an event."""
        found: list[dict[str, Any]] = []

        def has_come() -> bool:
            captured = self._capsys.readouterr()
            self.text += captured.out + captured.err
            lines = [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]
            found[:] = [line for line in lines if line["event"] == event]
            return bool(found)

        await eventually(has_come)
        return found[0]

    async def client(self) -> GenerationServiceAsyncStub:
        """A client of the server, once it listens."""
        return GenerationServiceStub(grpc.aio.insecure_channel((await self.line("listening"))["grpc"]))

    async def end(self) -> int:
        """The exit code."""
        code = await asyncio.wait_for(self.task, 10)
        captured = self._capsys.readouterr()
        self.text += captured.out + captured.err
        return code


@pytest.fixture
def _process_wide_state(own_logs: None) -> Iterator[None]:
    """Undoes what a server does to its process: logging, metrics without creation times, collections of less."""
    yield
    prometheus_client.enable_created_metrics()  # type: ignore[no-untyped-call]
    gc.unfreeze()


@asynccontextmanager
async def living(
    capsys: pytest.CaptureFixture[str],
    assemble: Assemble,
    show_progress: ShowProgress | None = None,
    **settings: Any,
) -> AsyncIterator[Life]:
    given = {"model": "echo", "store": Path("/nowhere"), "grpc_port": 0, "http_port": 0, "log_format": "json"}
    config = make_config({**given, **settings})
    task = asyncio.create_task(serve(config, assemble=assemble, show_progress=show_progress))
    try:
        yield Life(task, capsys)
    finally:
        if not task.done():
            task.cancel()
        await asyncio.wait({task})


def with_engine(engine: EchoEngine) -> Assemble:
    return lambda config, metrics, progress: make_backend(engine, MemoryStore())


def http_status(http: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{http}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def http_text(http: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{http}{path}", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


pytestmark = pytest.mark.usefixtures("_process_wide_state")


async def test_collections_pass_over_what_the_start_has_made(capsys: pytest.CaptureFixture[str]) -> None:
    made_before: list[list[int]] = [[] for _ in range(1000)]
    async with living(capsys, with_engine(EchoEngine())) as life:
        assert gc.get_freeze_count() == 0
        await life.line("ready")
        assert gc.get_freeze_count() > len(made_before)


async def test_progress_of_the_start_is_shown_until_the_engine_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown: list[tuple[str, int, int] | str] = []

    @contextmanager
    def show() -> Iterator[Progress]:
        yield lambda stage, done, total: shown.append((stage, done, total))
        shown.append("over")

    def assemble(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
        progress("quantize", 1, 2)
        progress("compile", 3, 9)
        return make_backend(EchoEngine(), MemoryStore())

    async with living(capsys, assemble, show_progress=show) as life:
        await life.line("ready")
        assert shown == [("quantize", 1, 2), ("compile", 3, 9), "over"]
    stages = [json.loads(line) for line in life.text.splitlines() if '"event": "loading"' in line]
    assert [(line["stage"], line["percent"]) for line in stages] == [("quantize", 50), ("compile", 33)]


async def streamed(client: GenerationServiceAsyncStub, text: str) -> str:
    """An answer, piece by piece."""
    return "".join([piece.text async for piece in client.GenerateStream(pb.GenerateRequest(text=text))])


async def test_running_request_finishes_and_new_ones_are_refused_while_draining(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = EchoEngine(step_s=0.05)
    async with living(capsys, with_engine(engine)) as life:
        facts = await life.line("ready")
        client = await life.client()
        running = asyncio.ensure_future(client.Generate(pb.GenerateRequest(text="a long one")))
        streaming = asyncio.ensure_future(streamed(client, "another long one"))
        await eventually(lambda: engine.running == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        await life.line("draining")
        refusal = await refused(client.Generate(pb.GenerateRequest(text="new")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refusal.retry_s == 1.0
        assert await asyncio.to_thread(http_status, facts["http"], "/readyz") == 503
        assert (await running).text == "a long one"
        assert await streaming == "another long one"
        assert await life.end() == 0
    assert engine.stopped


async def test_it_follows_its_store_and_closes_it_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    store = MemoryStore()

    def assemble(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
        return make_backend(EchoEngine(), store)

    async with living(capsys, assemble, store_poll_s=0.01) as life:
        facts = await life.line("ready")
        store.tasks["hats"] = [make_record("hats")]  # as another server does
        store.others_changed = {"hats"}
        line = 'manyhats_adapters{state="active"} 1.0'
        async with asyncio.timeout(5):
            while line not in await asyncio.to_thread(http_text, facts["http"], "/metrics"):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert await life.end() == 0
    assert store.is_closed


@pytest.mark.parametrize(("settings", "status"), [({}, 200), ({"page": False}, 404)])
async def test_the_page_is_served_unless_it_is_turned_off(
    capsys: pytest.CaptureFixture[str], settings: dict[str, Any], status: int
) -> None:
    async with living(capsys, with_engine(EchoEngine()), **settings) as life:
        http = (await life.line("ready"))["http"]
        assert await asyncio.to_thread(http_status, http, "/") == status
        assert await asyncio.to_thread(http_status, http, "/readyz") == 200


async def test_second_signal_ends_running_requests(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EchoEngine(step_s=30)
    async with living(capsys, with_engine(engine)) as life:
        await life.line("ready")
        running = asyncio.ensure_future((await life.client()).Generate(pb.GenerateRequest(text="endless")))
        await eventually(lambda: engine.running == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await life.line("draining")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await life.end() == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await running
    assert engine.running == 0


async def test_drain_limit_ends_running_requests(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EchoEngine(step_s=30)
    async with living(capsys, with_engine(engine), drain_limit_s=0.1) as life:
        await life.line("ready")
        running = asyncio.ensure_future((await life.client()).Generate(pb.GenerateRequest(text="endless")))
        await eventually(lambda: engine.running == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await life.end() == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await running
    assert engine.running == 0


async def test_while_loading_it_is_alive_but_not_ready_and_a_signal_ends_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_slowly(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
        for step in range(2000):
            progress("quantize", step, 2000)
            time.sleep(0.005)
        raise AssertionError("the loading was not stopped")

    async with living(capsys, load_slowly) as life:
        facts = await life.line("listening")
        refusal = await refused((await life.client()).Generate(pb.GenerateRequest(text="a")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")
        paths = ("/healthz", "/readyz", "/metrics")
        statuses = [await asyncio.to_thread(http_status, facts["http"], path) for path in paths]
        assert statuses == [200, 503, 200]
        assert (await life.line("loading"))["stage"] == "quantize"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await life.end() == 128 + signal.SIGTERM
    assert "Traceback" not in life.text


class StuckEngine(EchoEngine):
    """As while kernels are compiled: the start takes for ever."""

    async def start(self) -> None:
        await asyncio.sleep(3600)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("stage", ["loading", "compiling", "registering"])
async def test_a_signal_before_it_is_ready_ends_it_though_the_stage_goes_on(
    capsys: pytest.CaptureFixture[str], stage: str, log_format: str, number: signal.Signals
) -> None:
    reached, released = threading.Event(), threading.Event()

    class StuckStore(MemoryStore):
        def register(self, *args: Any, **kwargs: Any) -> Any:
            reached.set()
            released.wait(30)
            raise SourceNotFoundError("/a", "does not exist")

    def assemble(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
        progress("quantize", 1, 2)
        if stage == "registering":
            return make_backend(EchoEngine(), StuckStore())
        reached.set()
        if stage == "loading":  # and never reports again
            released.wait(30)
        return make_backend(StuckEngine(), MemoryStore())

    try:
        async with living(capsys, assemble, register={"hats": "/a"}, log_format=log_format) as life:
            await eventually(reached.is_set)
            os.kill(os.getpid(), number)
            assert await life.end() == 128 + number
    finally:
        released.set()
    word = "interrupted" if log_format == "text" else '{"event": "interrupted"}'
    assert life.text.splitlines().count(word) == 1
    assert "Traceback" not in life.text
    assert "ready" not in life.text


async def test_dead_engine_ends_the_process_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EchoEngine()
    async with living(capsys, with_engine(engine)) as life:
        await life.line("ready")
        engine.is_alive = False
        assert await life.end() == 1
    assert "the engine died" in life.text


async def test_model_that_cannot_be_loaded_is_one_line_and_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
        raise ModelError("no such model")

    async with living(capsys, fail) as life:
        assert await life.end() == 1
    assert "no such model" in life.text
    assert "Traceback" not in life.text


async def test_port_in_use_is_one_line_and_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    async with living(capsys, with_engine(EchoEngine())) as first:
        port = int((await first.line("ready"))["grpc"].rpartition(":")[2])
        async with living(capsys, with_engine(EchoEngine()), grpc_port=port) as second:
            assert await second.end() == 1
    assert f"cannot listen for gRPC on 127.0.0.1:{port}" in second.text


async def test_task_that_cannot_be_registered_at_start_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def assemble(config: ServeConfig, metrics: Metrics, progress: Progress) -> Backend:
        store = MemoryStore(errors={"/missing": SourceNotFoundError("/missing", "does not exist")})
        return make_backend(EchoEngine(), store)

    async with living(capsys, assemble, register={"hats": "/missing"}) as life:
        assert await life.end() == 1
    assert "/missing: does not exist" in life.text


async def test_text_format_prints_a_readable_ready_line(capsys: pytest.CaptureFixture[str]) -> None:
    async with living(capsys, with_engine(EchoEngine()), log_format="text") as life:
        await eventually(lambda: "ready: echo, gRPC on 127.0.0.1:" in capsys.readouterr().out)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await life.end() == 0


async def test_unexpected_error_is_logged_with_its_traceback_and_the_callers_error_id(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = EchoEngine(error=RuntimeError("a secret"))
    async with living(capsys, with_engine(engine)) as life:
        await life.line("ready")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (await life.client()).Generate(pb.GenerateRequest(text="a", request_id="mine"))
        line = await life.line("unexpected error")
    refusal = refusal_of(caught.value)
    assert line["error_id"] == refusal.info.metadata["error_id"]
    assert (line["request_id"], line["method"], line["level"]) == ("mine", "Generate", "error")
    assert "in generate\n" in line["exception"]
    assert "RuntimeError: (hidden" in line["exception"]  # a prompt might be in what it says
    assert "secret" not in json.dumps(line)
    assert "secret" not in refusal.message
