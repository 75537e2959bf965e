"""One replica: a server without ports, in a process of Ray Serve's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from manyhats.adapters.errors import AdapterError
from manyhats.engine.threads.openmp import sleep_soon
from manyhats.server.access.tokens import TokenFile
from manyhats.server.grpc.port import SERVICES, HealthFollower
from manyhats.server.http.app import make_app
from manyhats.server.http.metrics_port import MetricsPort
from manyhats.server.http.probes import make_metrics_app
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.serving import Serving, prepare_process, running
from manyhats.server.observability.logs import ProgressLog
from manyhats.server.ray.calls import ProxiedCalls
from manyhats.server.ray.ingress import streaming_paths
from manyhats.server.service.answers import Answers
from manyhats.server.service.gate import ServingState

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class Replica:
    """The base model, and the tasks of the store that it shares with the other replicas.

    Its methods are those of all gRPC services, by their names, and the HTTP port's application. Ray Serve starts it,
    asks after its health, sends calls, and at the end waits for those that run before it lets it go.

    Args:
        config: the settings; of ports, ``metrics_port`` alone is opened.
        call_limit_s: what a call may take at most.
    """

    async def __init__(self, config: ServeConfig, call_limit_s: float) -> None:  # type: ignore[misc]  # Serve waits
        self._stack = AsyncExitStack()
        sleep_soon()  # before torch is imported
        prepare_process(config)
        self._config = config = _with_threads(config)
        self._serving = serving = Serving(config)
        self._tokens = None if config.token_file is None else TokenFile(config.token_file)
        serving.metrics.attach_files(None, self._tokens)
        health = HealthFollower(serving.gate, SERVICES)
        answers = Answers(unread_limit_s=config.engine.unread_limit_s)
        self._calls = ProxiedCalls(serving.calls, answers, self._tokens, health, call_limit_s)
        self._note: Callable[[str], Awaitable[str]] = serve.multiplexed(
            max_num_models_per_replica=config.engine.max_loaded_adapters
        )(_only_its_name)
        self._stack.push_async_callback(serving.close)
        if config.metrics_port is not None:
            metrics = make_metrics_app(serving.gate, serving.metrics.registry)
            port = MetricsPort(metrics, host=config.host, port=config.metrics_port)
            port.start()
            self._stack.callback(port.stop)
        backend = await serving.load(self._stack, ProgressLog())
        serving.open(self._stack, await serving.register(backend))
        self._stack.enter_context(running(health.follow_until_dead()))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP port's application."""
        config = self._config
        app = make_app(
            self._serving.surroundings(self._tokens), origins=config.cors_origins, has_page=config.page
        )

        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._note_task()
            await app(scope, receive, send)

        return noting

    async def check_health(self) -> None:
        """Have Serve replace this replica if it fails several times in a row.

        Raises:
            RuntimeError: the engine is dead, or silent for too long.
        """
        state = self._serving.gate.state
        if state is not ServingState.READY:
            raise RuntimeError(f"the engine is {state.value}")

    async def __del__(self) -> None:
        await self._stack.aclose()

    async def _note_task(self) -> None:
        """Have Serve send further calls of this one's task here; until others have been called since."""
        name = serve.get_multiplexed_model_id()
        if name and self._is_task(name):
            await self._note(name)

    def _is_task(self, name: str) -> bool:
        """Whether a task has that name: others' must not push tasks out."""
        try:
            self._serving.gate.backend.store.get(name)
        except AdapterError:
            return False
        return True


async def _only_its_name(name: str) -> str:
    """What Serve keeps of a task: what is in memory is the engine's affair."""
    return name


def _with_threads(config: ServeConfig) -> ServeConfig:
    """The settings, with as many threads as Ray gives processors, unless they say how many."""
    assigned = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    if config.engine.num_threads or not assigned:
        return config
    return replace(config, engine=replace(config.engine, num_threads=assigned))


def _method(path: str, is_stream: bool) -> Any:
    """What Serve calls for one method of a service; the name of the last parameter is Serve's."""

    async def answer(self: Replica, request: Any, grpc_context: Any) -> Any:
        await self._note_task()
        return await self._calls.answer(path, request, grpc_context)

    async def stream(self: Replica, request: Any, grpc_context: Any) -> Any:
        await self._note_task()
        return self._calls.stream(path, request, grpc_context)

    function = stream if is_stream else answer
    function.__name__ = path.rpartition("/")[2]
    return function


for _path, _is_stream in streaming_paths().items():
    setattr(Replica, _path.rpartition("/")[2], _method(_path, _is_stream))
