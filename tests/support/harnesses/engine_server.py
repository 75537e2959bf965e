"""A real engine behind a real gRPC port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import grpc

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.engine import Engine
from manyhats.engine.progress import no_progress
from manyhats.server.grpc.port import GrpcLimits, GrpcPort
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.wiring import open_backend
from manyhats.server.observability.metrics import Metrics
from manyhats.server.service.backend import Backend
from manyhats.server.service.call import Calls
from manyhats.server.service.gate import Gate
from manyhats.v1.generation_pb2_grpc import GenerationServiceStub
from support.fakes.server import INFO, SMALL_WINDOW, MemoryStore, make_backend
from support.harnesses.engine import running_engine

if TYPE_CHECKING:
    from manyhats.v1.generation_pb2_grpc import GenerationServiceAsyncStub


@dataclass(frozen=True)
class Served:
    """An engine, and a client of its own port that takes little ahead of its reader."""

    engine: Engine
    generation: GenerationServiceAsyncStub
    address: str


@asynccontextmanager
async def served_engine(model: LoadedModel, **config: Any) -> AsyncIterator[Served]:
    """Serves a tiny model; ``config`` is the engine's."""
    async with running_engine(model, **config) as engine:
        backend = replace(
            make_backend(cast(Any, engine), MemoryStore(), model.tokenizer),
            info=replace(INFO, vocab_size=model.architecture.vocab_size),
        )
        async with (
            _port(
                backend, Metrics(max_task_labels=4), unread_limit_s=engine.config.unread_limit_s
            ) as address,
            grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as channel,
        ):
            yield Served(engine, GenerationServiceStub(channel), address)


@asynccontextmanager
async def served_config(config: ServeConfig) -> AsyncIterator[tuple[str, Backend]]:
    """Serves what a server's process would by these settings: the port's address, and what answers there."""
    metrics = Metrics(max_task_labels=10)
    backend = await asyncio.to_thread(open_backend, config, metrics, no_progress)
    try:
        await backend.engine.start()
        async with _port(backend, metrics) as address:
            yield address, backend
    finally:
        await backend.engine.stop(0.0)
        backend.store.close()


@asynccontextmanager
async def _port(backend: Backend, metrics: Metrics, **limits: Any) -> AsyncIterator[str]:
    """A gRPC port of its own, by its address."""
    gate = Gate(heartbeat_limit_s=60.0)
    metrics.attach(backend)
    gate.open(backend)
    port = GrpcPort(Calls(gate, metrics), host="127.0.0.1", port=0, limits=GrpcLimits(**limits))
    await port.start()
    try:
        yield port.address
    finally:
        await port.stop(0.0)
