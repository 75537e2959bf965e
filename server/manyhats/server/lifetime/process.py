"""The life of a server process: ports, loading, ready, draining, end."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import structlog

from manyhats.adapters.errors import AdapterError
from manyhats.engine.errors import EngineError
from manyhats.engine.progress import Progress, no_progress
from manyhats.server.access.addresses import is_loopback
from manyhats.server.access.errors import ConfigError, ServerError
from manyhats.server.access.tls import ServerTls
from manyhats.server.access.tokens import TokenFile
from manyhats.server.grpc.port import GrpcLimits, GrpcPort
from manyhats.server.http.app import make_app
from manyhats.server.http.connection import ConnectionLimits
from manyhats.server.http.metrics_port import MetricsPort
from manyhats.server.http.port import HttpPort
from manyhats.server.http.probes import make_metrics_app
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.hang import end_at_once
from manyhats.server.lifetime.serving import (
    STOP_LIMIT_S,
    Assemble,
    Serving,
    Started,
    prepare_process,
    running,
)
from manyhats.server.lifetime.system import StopSignals, connection_limits, raise_file_limit, wait_for_either
from manyhats.server.observability.logs import LoadingStopped, ProgressLog, both
from manyhats.server.observability.timed_loop import TimedLoop
from manyhats.server.service.backend import Backend

ShowProgress = Callable[[], AbstractContextManager[Progress]]

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BY_SIGNAL = 128
"""Plus the signal's number: the signal came before the server was ready."""
_log = structlog.get_logger("manyhats.process")


async def serve(
    config: ServeConfig, *, assemble: Assemble | None = None, show_progress: ShowProgress | None = None
) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit code.

    Both ports are open at once; until the model is loaded, they answer UNAVAILABLE and 503. A first signal
    lets running requests finish, a second ends them. Before the server is ready, a signal ends it within a second or
    so, whatever it is doing: threads that load or compile may then still be running, and a process that does not want
    to wait for them exits by ``os._exit``. Nothing is lost: files are written to a temporary place and then moved.

    Args:
        config: the settings.
        assemble: loads the model and opens the store, in a worker thread; the real ones by default.
        show_progress: shows startup progress besides the log; nothing by default.

    Returns:
        0 after a signal; 1 if the server could not start, or the engine died; 128 and the signal's number if it came
        before the server was ready. If engine or store hang, it does not return: the process ends (``hang.py``).
    """
    prepare_process(config)
    try:
        process = _Process(config, Serving(config, assemble), show_progress)
        code = await process.run()
        if process.is_held_up:
            end_at_once(code)
        return code
    except ConfigError as error:
        flag = error.setting.replace("_", "-")
        _log.error("cannot serve", reason=f"--{flag}{str(error).removeprefix(error.setting)}")
        return EXIT_FAILED
    except (ServerError, EngineError, AdapterError) as error:
        _log.error("cannot serve", reason=str(error))
        return EXIT_FAILED


class _Process:
    def __init__(self, config: ServeConfig, serving: Serving, show_progress: ShowProgress | None) -> None:
        self._config = config
        self._serving = serving
        self._show_progress = show_progress or (lambda: nullcontext(no_progress))
        self._begin_s = time.monotonic()
        self._progress = ProgressLog()
        self._connections = connection_limits(raise_file_limit())
        self._metrics, self._gate = serving.metrics, serving.gate
        self._stop = StopSignals()

    async def run(self) -> int:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._stop.installed())
            loop = asyncio.get_running_loop()
            if isinstance(loop, TimedLoop):
                loop.on_turn = self._metrics.turn
            stack.push_async_callback(self._serving.close)
            tls = None if self._config.tls_files is None else ServerTls(self._config.tls_files)
            if tls is not None:
                stack.enter_context(running(tls.follow_expiry()))
            tokens = None if self._config.token_file is None else TokenFile(self._config.token_file)
            self._metrics.attach_files(tls, tokens)
            metrics = self._metrics_port(tls)
            if metrics is not None:
                metrics.start()
                stack.callback(metrics.stop)
            http = self._http_port(tls, tokens)
            self._metrics.attach_http(http)
            await http.start()
            stack.push_async_callback(http.stop, 1.0)
            grpc_port = self._grpc_port(tls, tokens)
            await grpc_port.start()
            stack.push_async_callback(grpc_port.stop, 1.0)
            _log.info(
                "listening",
                grpc=grpc_port.address,
                http=http.address,
                metrics=None if metrics is None else metrics.address,
                tls=tls is not None,
                tokens=self._config.token_file is not None,
            )
            started = await self._unless_stopped(self._start(stack))
            if started is None:
                self._say_interrupted()
                return EXIT_BY_SIGNAL + self._stop.number
            self._serving.open(stack, started)
            await grpc_port.health.publish()
            self._announce(started.backend, Addresses(grpc_port.address, http.address))
            return await self._serve(grpc_port)

    @property
    def is_held_up(self) -> bool:
        """Whether threads that wait for the store are left, for which Python would wait as the process ends."""
        return self._gate.is_store_busy

    def _metrics_port(self, tls: ServerTls | None) -> MetricsPort | None:
        config = self._config
        if config.metrics_port is None:
            return None
        return MetricsPort(
            make_metrics_app(self._gate, self._metrics.registry),
            host=config.host,
            port=config.metrics_port,
            tls=None if config.http_insecure else tls,
        )

    def _http_port(self, tls: ServerTls | None, tokens: TokenFile | None) -> HttpPort:
        config = self._config
        needs_certificate = config.tls_client_ca is not None and not config.http_insecure
        around = self._serving.surroundings(tokens, needs_certificate=needs_certificate)
        is_local = is_loopback(config.host) and tokens is None
        return HttpPort(
            make_app(around, origins=config.cors_origins, is_local=is_local, has_page=config.page),
            host=config.host,
            port=config.http_port,
            tls=None if config.http_insecure else tls,
            limits=ConnectionLimits(
                max_connections=self._connections.http, unread_limit_s=config.engine.unread_limit_s
            ),
        )

    def _grpc_port(self, tls: ServerTls | None, tokens: TokenFile | None) -> GrpcPort:
        config = self._config
        return GrpcPort(
            self._serving.calls,
            host=config.host,
            port=config.grpc_port,
            tls=tls,
            tokens=tokens,
            limits=GrpcLimits(
                max_connections=self._connections.grpc, unread_limit_s=config.engine.unread_limit_s
            ),
        )

    async def _unless_stopped(self, start: Coroutine[Any, Any, Started]) -> Started | None:
        """The result of the start; None if a signal came first."""
        starting = asyncio.create_task(start)
        await wait_for_either(starting, self._stop.first)
        if not self._stop.first.is_set():
            return await starting
        self._progress.stop()  # a thread that loads or compiles ends at its next report
        await asyncio.wait({starting}, timeout=STOP_LIMIT_S)
        starting.cancel()
        await asyncio.wait({starting})
        if not starting.cancelled() and not isinstance(starting.exception(), LoadingStopped | None):
            _log.info("the start had failed", reason=str(starting.exception()))
        return None

    async def _start(self, stack: AsyncExitStack) -> Started:
        with self._show_progress() as shown:
            backend = await self._serving.load(stack, both(self._progress, shown))
        return await self._serving.register(backend)

    async def _serve(self, grpc_port: GrpcPort) -> int:
        health = asyncio.create_task(grpc_port.health.follow_until_dead())
        await wait_for_either(health, self._stop.first)
        if health.done():
            await health
            _log.error("the engine died")
            return EXIT_FAILED
        health.cancel()
        await self._drain(grpc_port)
        return EXIT_OK

    async def _drain(self, grpc_port: GrpcPort) -> None:
        """Refuse new requests; wait for the running ones until the drain limit or a second signal."""
        self._gate.drain()
        await grpc_port.health.publish()
        _log.info("draining", running=self._gate.num_running, limit_s=self._config.drain_limit_s)
        idle = asyncio.create_task(self._gate.wait_idle())
        await wait_for_either(idle, self._stop.second, self._config.drain_limit_s)
        idle.cancel()
        _log.info("drained", cancelled=self._gate.num_running)

    def _say_interrupted(self) -> None:
        word = "interrupted"
        print(json.dumps({"event": word}) if self._config.log_format == "json" else word, file=sys.stderr)

    def _announce(self, backend: Backend, addresses: Addresses) -> None:
        seconds = round(time.monotonic() - self._begin_s, 3)
        print(ready_line(self._config, backend, addresses, seconds), flush=True)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the server listens, each as ``host:port``."""

    grpc: str
    http: str


def ready_line(config: ServeConfig, backend: Backend, addresses: Addresses, startup_seconds: float) -> str:
    """The line on stdout that announces that requests are served."""
    facts: Mapping[str, object] = {
        "event": "ready",
        "grpc": addresses.grpc,
        "http": addresses.http,
        "model": backend.info.name,
        "startup_seconds": startup_seconds,
    }
    if config.log_format == "json":
        return json.dumps(facts)
    where = f"gRPC on {addresses.grpc}, HTTP on {addresses.http}"
    return f"ready: {backend.info.name}, {where} ({startup_seconds:.1f} s)"
