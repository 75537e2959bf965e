"""Servers whose model costs nothing, so that what is left is the cost of getting tokens to callers."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import grpc
import numpy as np
import torch

from manyhats.adapters.store.opening import open_store
from manyhats.engine.backends.logits import Finished
from manyhats.engine.backends.plan import StepPlan
from manyhats.engine.backends.wants import Outcome, Token, Wants
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.config import EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.opening import open_engine
from manyhats.engine.threads.openmp import sleep_soon
from manyhats.server.grpc.port import GrpcPort
from manyhats.server.http.app import make_app
from manyhats.server.http.call import Surroundings
from manyhats.server.http.port import HttpPort
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.wiring import limits
from manyhats.server.observability.logs import configure_logs
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.answers import Answers
from manyhats.server.service.backend import Backend, ModelInfo
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate

_WARM_STEPS = 20
_BARE_MESSAGE = b"\n\x20" + b"5" * 32 + b"\x12\x05 word\x1a\x09\x08\xac\x02\x12\x05 word"
"""What a token takes on the wire: request id, text, and the token with its own text."""


class Pace:
    """Takes the time of steps, and notes what processor time threads have at the first that counts and the last."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next_s = 0.0
        self.expect(0, 0)

    def expect(self, num_streams: int, num_steps: int) -> None:
        """Count so many steps of so many streams, after some to warm up."""
        self.num_steps = _WARM_STEPS + num_steps + 1
        self._num_streams, self._num_tokens = num_streams, num_streams * num_steps
        self._count = 0
        self._marks: list[Mapping[int, int]] = []

    def step(self, num_rows: int) -> None:
        """Wait for as long as a model would compute: without the interpreter lock."""
        if num_rows == self._num_streams:
            if self._count in (_WARM_STEPS, self.num_steps - 1):
                self._marks.append(_thread_times())
            self._count += 1
        now_s = time.perf_counter()
        self._next_s = max(self._next_s, now_s) + self._step_s
        time.sleep(self._next_s - now_s)

    def microseconds(self, names: Mapping[int | None, str]) -> Mapping[str, float]:
        """Processor time for a token, by thread; that of those without a name is ``others``."""
        if len(self._marks) < 2:
            raise RuntimeError(
                f"{self._num_streams} streams had {self._count} steps together, not {self.num_steps}"
            )
        before, after = self._marks
        spent: dict[str, float] = {}
        for thread, time_ns in after.items():
            name = names.get(thread, "others")
            spent[name] = spent.get(name, 0.0) + (time_ns - before.get(thread, 0)) / 1000 / self._num_tokens
        return spent


def _thread_times() -> Mapping[int, int]:
    """Thread → nanoseconds of processor time."""
    times = {}
    for directory in Path("/proc/self/task").iterdir():
        try:
            times[int(directory.name)] = int((directory / "schedstat").read_text().split()[0])
        except OSError:  # it has ended
            continue
    return times


class _FreeCache:
    num_bytes = 0

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size


class _FreeLogits:
    """Chooses one token after the other."""

    def __init__(self, first: int, vocab_size: int) -> None:
        self._first, self._vocab_size = first, vocab_size

    def finish(self, wants: Wants) -> Finished:
        first, count = self._first, wants.choices.num_rows
        tokens = [Token(token_id % self._vocab_size) for token_id in range(first, first + count)]
        no_rows = np.empty((0, self._vocab_size), np.float32)
        return Finished(Outcome(tokens=tokens, targets=[], whole=no_rows, bad_rows=frozenset()))


class _NoAdapters:
    """Slots that nothing is placed in."""

    memory = None


class FreeBackend:
    """A backend, and its model, that compute nothing in the time that a pace says."""

    name = "free"
    has_own_memory = False
    runs_ahead = False
    num_bytes: Mapping[str, int] = {}

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._at = 0

    def prepare(self, architecture: Any, weights: Any, progress: Any = None) -> FreeBackend:
        self.architecture = architecture
        return self

    def new_cache(self, architecture: Any, block_size: int, dtype: str, num_bytes: int | None) -> _FreeCache:
        return _FreeCache(1024, block_size)

    def new_adapters(self, architecture: Any, num_slots: int, dtype: str) -> _NoAdapters:
        return _NoAdapters()

    def start_thread(self) -> None: ...

    def leave_processors(self, count: int) -> None: ...

    def warm_up(self, cache: Any, adapters: Any, slot: int, progress: Any) -> None: ...

    def forward(self, plan: StepPlan, cache: Any, adapters: Any) -> _FreeLogits:
        self._pace.step(plan.num_rows)
        self._at += 131
        return _FreeLogits(self._at, self.architecture.vocab_size)


class OwnServer:
    """Lives in a worker process: both ports over an engine whose model costs nothing."""

    def __init__(self, model: str, step_s: float) -> None:
        sleep_soon()
        configure_logs("json", "error")
        self._pace = Pace(step_s)
        self._metrics = Metrics(max_task_labels=100)
        self._gate = Gate(heartbeat_limit_s=60.0)
        self._model = load_model(model, quantization="nf4", dtype=torch.bfloat16)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self._is_ready = threading.Event()
        self._thread.start()
        self._is_ready.wait()

    async def _serve(self) -> None:
        engine = open_engine(
            self._model, EngineConfig(num_threads=1), _no_adapter, backend=cast(Any, FreeBackend(self._pace))
        )
        engine.loop.on_step = self._metrics.step
        self._engine = engine
        await engine.start()
        with TemporaryDirectory(prefix="manyhats-bench-") as directory:
            backend = _backend(self._model, engine, Path(directory))
            self._metrics.attach(backend)
            calls = Calls(self._gate, self._metrics)
            port = GrpcPort(calls, host="127.0.0.1", port=0)
            around = Surroundings(calls=calls, answers=Answers(unread_limit_s=60.0))
            http = HttpPort(make_app(around), host="127.0.0.1", port=0)
            await port.start()
            await http.start()
            gc.collect()
            gc.freeze()  # as the server does
            self._gate.open(backend)
            self.addresses = {"grpc": port.address, "http": http.address}
            self._is_ready.set()
            await asyncio.Event().wait()

    def address(self, transport: str) -> str:
        """Of a port, ``grpc`` or ``http``."""
        return self.addresses[transport]

    def expect(self, num_streams: int, num_steps: int) -> int:
        """Get ready to count; returns how many steps all streams must have together."""
        self._pace.expect(num_streams, num_steps)
        return self._pace.num_steps

    def microseconds(self) -> Mapping[str, float]:
        """Processor time for a token, by thread."""
        engine = next(each for each in threading.enumerate() if each.name == "engine")
        return self._pace.microseconds({engine.native_id: "engine", self._thread.native_id: "loop"})


def _backend(model: LoadedModel, engine: Engine, directory: Path) -> Backend:
    return Backend(
        engine=engine,
        store=open_store(directory, model.description),
        tokenizer=model.tokenizer,
        info=ModelInfo(
            name=model.name,
            digest=model.description.digest,
            quantization="nf4",
            dtype="bfloat16",
            device="cpu",
            vocab_size=model.architecture.vocab_size,
        ),
        limits=limits(ServeConfig()),
    )


def _no_adapter(record: object) -> Any:
    raise LookupError("there are no adapters")


class BareServer:
    """Lives in a worker process: gRPC's own server for asyncio, which sends one message a step in each stream."""

    def __init__(self, step_s: float) -> None:
        self._pace = Pace(step_s)
        self._waiting: list[asyncio.Future[None]] = []
        self._is_over = False
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self._thread.start()
        self._is_ready.wait()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([_Answering(grpc.unary_stream_rpc_method_handler(self._stream))])
        self._address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._is_ready.set()
        await asyncio.Event().wait()

    async def _stream(self, request: bytes, context: Any) -> None:
        while not self._is_over:
            waiting = self._loop.create_future()
            self._waiting.append(waiting)
            await waiting
            await context.write(_BARE_MESSAGE)

    def address(self, transport: str) -> str:
        """Of the port."""
        return self._address

    def expect(self, num_streams: int, num_steps: int) -> int:
        """Get ready to count; returns how many steps all streams must have together."""
        self._pace.expect(num_streams, num_steps)
        self._is_over = False
        self._ticking = threading.Thread(target=self._tick, args=(num_streams,), daemon=True)
        self._ticking.start()
        return self._pace.num_steps

    def _tick(self, num_streams: int) -> None:
        while len(self._waiting) < num_streams:
            time.sleep(0.01)
        for _ in range(self._pace.num_steps):
            self._pace.step(num_streams)
            self._loop.call_soon_threadsafe(self._wake)
        self._is_over = True
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.set_result(None)

    def microseconds(self) -> Mapping[str, float]:
        """Processor time for a token, by thread."""
        return self._pace.microseconds({self._ticking.native_id: "engine", self._thread.native_id: "loop"})


class _Answering(grpc.GenericRpcHandler):
    """Has the same handler for every method."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        return self._handler
